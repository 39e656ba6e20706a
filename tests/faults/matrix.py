"""The fault matrix: every fault that a run must survive or name, and the tests that inject it for real."""

from __future__ import annotations

from dataclasses import dataclass

HERE = "tests/faults/test_matrix.py"
CHECKPOINT = "tests/test_checkpoint.py"
TRAINING = "tests/test_training.py"
UTILS = "tests/test_utils.py"
DATA = "tests/test_batches.py"
SHARDS = "tests/test_shards.py"
CORPUS = "tests/test_corpus.py"
CONFIG = "tests/test_config.py"
TRACKING = "tests/test_tracking.py"
SWEEP = "tests/test_sweep.py"
TOKENIZE = "tests/test_tokenize_text.py"
DOCUMENTS = "tests/test_documents.py"
FINEWEB = "tests/test_fineweb.py"
PACKAGES = "tests/test_packages.py"
CLAIMS = "tests/test_claims.py"
UNUSUAL = "tests/mup/test_mup_unusual.py"
FUZZ = "tests/mup/test_mup_fuzz.py"
REPORT = "tests/test_report.py"
PICTURES = "tests/test_pictures.py"
TERMINAL = "tests/test_terminal.py"
DOCTOR = "tests/test_doctor.py"
DAMAGED = "tests/test_damaged_runs.py"
DIVERGENCE = "tests/test_divergence.py"
RUN_FOLDER = "tests/test_run_folder.py"
SLURM = "tests/test_slurm.py"
CLI = "tests/test_cli.py"
PLAN = "tests/test_plan.py"
FLAGS = "tests/test_flags.py"
ENTRY = "tests/test_entrypoints.py"
DOCS = "tests/test_docs_commands.py"
FILES = "tests/test_files.py"
TRANSFER_COMMAND = "tests/test_transfer_command.py"
HARDWARE = "tests/test_hardware.py"
TOKENIZERS = "tests/test_tokenizers.py"


@dataclass(frozen=True)
class Row:
    """One fault. tests: pytest node ids without parameters. needs: what a machine must have for the whole of it."""

    number: int
    fault: str
    expected: str
    tests: tuple[str, ...]
    needs: str = ""


def _rows(*rows: tuple[str, str, list[str]] | tuple[str, str, list[str], str]) -> list[Row]:
    return [
        Row(number, fault, expected, tuple(tests), *needs)
        for number, (fault, expected, tests, *needs) in enumerate(rows, 1)
    ]


MATRIX = _rows(
    # --- checkpoint, written
    (
        "SIGKILL at a random time, one rank",
        "resumes from the last commit; losses and weights bitwise equal",
        [f"{TRAINING}::test_sigkill_at_random_moments_changes_nothing", f"{CHECKPOINT}::test_random_kills"],
    ),
    (
        "death before each file-system call of save, purge and cleaning up, torn writes included",
        "the old or the new checkpoint is complete; nothing is left over after the next start",
        [f"{CHECKPOINT}::test_every_crash_point"],
    ),
    (
        "SIGKILL of one rank during a save",
        "no commit; the other rank ends; the checkpoint before loads",
        [f"{CHECKPOINT}::test_losing_a_rank_leaves_the_last_commit"],
    ),
    (
        "disk full during a save",
        "a warning with needed and free bytes, training continues, the next save works once there is space",
        [
            f"{HERE}::test_row_04_training_outlives_a_full_disk",
            f"{CHECKPOINT}::test_a_disk_that_is_really_full",
            f"{CHECKPOINT}::test_file_size_limit",
            f"{TRAINING}::test_a_failed_save_costs_a_warning_and_three_the_run",
        ],
        "root, to mount a small tmpfs",
    ),
    (
        "ENOSPC, EIO, EROFS or EACCES at any call of a save",
        "as 4, with the error's name; never called saved before the last fsync",
        [
            f"{CHECKPOINT}::test_a_disk_fault_at_any_call_spares_the_earlier_ones",
            f"{CHECKPOINT}::test_one_rank_failing_fails_all",
            f"{CHECKPOINT}::test_order_of_syncs_and_renames",
        ],
    ),
    (
        "a background save still runs at the next save, or at the end",
        "it is waited for; never two writers",
        [f"{CHECKPOINT}::test_there_is_never_a_second_writer"],
    ),
    (
        "weights change while a background save runs",
        "the checkpoint is of the step that was saved",
        [
            f"{CHECKPOINT}::test_background_save_holds_the_step_that_was_saved",
            f"{CHECKPOINT}::test_background_and_foreground_write_the_same_bytes",
        ],
    ),
    (
        "the background writer fails",
        "heard of at the next step, once",
        [f"{CHECKPOINT}::test_a_background_fault_surfaces_once"],
    ),
    (
        "one step is saved twice",
        "a complete one is kept untouched, a damaged one is replaced",
        [f"{CHECKPOINT}::test_a_complete_step_is_kept_and_a_damaged_one_is_replaced"],
    ),
    (
        "purge with incomplete and damaged folders present",
        "only intact ones count; fewer than 2 are refused",
        [
            f"{CHECKPOINT}::test_purge_counts_only_intact_ones",
            f"{CHECKPOINT}::test_keeping_one_is_refused",
            f"{CHECKPOINT}::test_milestones_stay",
        ],
    ),
    (
        "two runs in one folder",
        "the second refuses and names the first's process; a dead owner's lock is taken over",
        [f"{HERE}::test_row_11_two_processes_in_one_folder"],
    ),
    (
        "clocks that differ between ranks, and jump",
        "all ranks save at the same steps",
        [f"{HERE}::test_row_12_clocks_that_differ_and_jump"],
    ),
    # --- checkpoint, read
    (
        "one bit flipped in any file",
        "never loaded; the checkpoint before is taken, with a line naming the file",
        [f"{CHECKPOINT}::test_flipped_bits_are_never_loaded"],
    ),
    (
        "a file cut, emptied, missing, longer or swapped",
        "as 13",
        [
            f"{CHECKPOINT}::test_truncated_longer_and_missing_files_are_never_loaded",
            f"{CHECKPOINT}::test_swapped_files_and_renamed_folders_are_noticed",
        ],
    ),
    (
        "a malicious pickle in any file",
        "refused, never executed",
        [f"{CHECKPOINT}::test_no_planted_code_runs", f"{CHECKPOINT}::test_the_package_never_unpickles"],
    ),
    (
        "resuming with another setting",
        "refused with the setting's name, unless it cannot change what is computed",
        [f"{HERE}::test_row_16_every_setting_that_changes_the_run_is_refused"],
    ),
    (
        "a missing, unexpected or reshaped parameter",
        "refused with the keys; nothing is loaded in part",
        [f"{HERE}::test_row_17_another_model_is_refused_whole", f"{CHECKPOINT}::test_check_match_lists_the_keys"],
    ),
    (
        "a newer or an older format",
        "newer: refused, both versions named; older: read",
        [
            f"{CHECKPOINT}::test_a_newer_schema_names_both_versions",
            f"{CHECKPOINT}::test_schema_1_stays_readable",
            f"{HERE}::test_row_18_a_checkpoint_of_version_0_1_0_resumes",
        ],
    ),
    (
        "resuming on another number of ranks",
        "bitwise the same with --deterministic; one that does not divide the batch is refused",
        [f"{HERE}::test_row_19_changing_the_number_of_ranks", f"{TRAINING}::test_strict_needs_branches_of_the_tree"],
    ),
    (
        "resuming with another batch, length or schedule",
        "refused with the setting's name",
        [f"{HERE}::test_row_16_every_setting_that_changes_the_run_is_refused"],
    ),
    (
        "starting again after the end",
        "says so, changes no checkpoint and no metric, exit code 0",
        [f"{TRAINING}::test_a_finished_run_resumes_to_nothing"],
    ),
    # --- data
    (
        "a file that is no shard: pointer, web page, archive, other magic or version",
        "refused before the first step with its likely cause, also under python -O",
        [f"{SHARDS}::test_bad_file_is_refused", f"{SHARDS}::test_checks_survive_python_minus_o"],
    ),
    (
        "a header whose count is wrong, odd or trailing bytes",
        "refused before anything is allocated",
        [f"{SHARDS}::test_bad_file_is_refused", f"{SHARDS}::test_longest_shard"],
    ),
    ("random damage to shards", "refused, or a well-formed shard", [f"{SHARDS}::test_fuzzed_files"]),
    (
        "a token outside the vocabulary",
        "found before it reaches the embedding; file, offset and token named",
        [f"{DATA}::test_id_outside_the_vocabulary", f"{CORPUS}::test_tokenizer_that_the_shards_do_not_have"],
    ),
    ("writing a token that needs more than 16 bits", "refused; never wrapped", [f"{SHARDS}::test_write_never_wraps"]),
    (
        "a shard of more than 2^31 - 1 tokens",
        "refused by the writer; the longest reads",
        [f"{SHARDS}::test_longest_shard"],
    ),
    (
        "a shard without BOS, documents longer than a shard",
        "refused; skipped tokens are counted",
        [f"{DATA}::test_shard_without_bos", f"{DATA}::test_usage_counts_every_token"],
    ),
    (
        "no shard, one shard, no validation shard, too little",
        "refused, or it works",
        [f"{SHARDS}::test_folder_without_shards", f"{DATA}::test_corpus_too_small", f"{DATA}::test_val_too_small"],
    ),
    (
        "the data ends",
        "it repeats in a new order, or the run is refused before its first step",
        [
            f"{HERE}::test_row_30_data_that_would_end_too_early",
            f"{DATA}::test_data_ends",
            f"{DATA}::test_epochs_visit_the_same_steps_in_another_order",
        ],
    ),
    (
        "shards replaced between two attempts",
        "refused: the corpus is not the same",
        [f"{HERE}::test_row_31_another_corpus_in_the_same_place", f"{SHARDS}::test_fingerprint_is_of_the_tokens"],
    ),
    (
        "a shard cut or deleted, or the whole folder, during a run",
        "an error, no SIGBUS; the last checkpoint loads",
        [
            f"{HERE}::test_row_32_shards_that_vanish",
            f"{DATA}::test_file_that_shrinks_is_an_error_not_a_signal",
            f"{DATA}::test_file_cut_while_it_is_read_is_an_error_not_a_signal",
        ],
    ),
    (
        "token order on another number of ranks",
        "the same tokens in every step",
        [f"{DATA}::test_tokens_do_not_depend_on_the_world_size", f"{DATA}::test_stream_shares_a_step"],
    ),
    ("resuming at any step", "the next batch is that of the whole run", [f"{DATA}::test_any_step_can_be_resumed"]),
    (
        "a corpus that is half written or downloaded",
        "never visible under its final name; a broken folder is named",
        [
            f"{CORPUS}::test_build_that_fails_leaves_nothing",
            f"{CORPUS}::test_nothing_looks_finished_before_the_rename",
            f"{CORPUS}::test_auto_with_half_of_fineweb_does_not_fall_back",
            f"{SHARDS}::test_failed_write_keeps_the_old_file",
        ],
    ),
    # --- numbers
    (
        "NaN or infinity in one gradient entry, on any rank",
        "no weight changes on any rank; rank and parameter named, the step dumped; stop, skip or roll back",
        [
            f"{HERE}::test_row_36_a_nan_on_one_rank_stops_all",
            f"{TRAINING}::test_a_non_finite_gradient_stops_before_the_update",
            f"{TRAINING}::test_skipping_leaves_out_the_update_and_nothing_else",
            f"{TRAINING}::test_rolling_back_leaves_out_the_data",
            f"{TRAINING}::test_the_bad_step_is_dumped",
        ],
    ),
    (
        "a loss that jumps",
        "a warning; its window is in the checkpoint, so a resumed run warns alike",
        [
            f"{TRAINING}::test_a_spike_is_told_and_a_resumed_run_tells_it_too",
            f"{TRAINING}::test_a_spike_in_a_run_is_a_warning_and_its_window_is_saved",
        ],
    ),
    ("a loss over no tokens", "0, with gradients of 0", [f"{HERE}::test_row_38_a_loss_over_no_tokens"]),
    (
        "NaN in a metric",
        "strict JSON",
        [f"{TRACKING}::test_numbers_that_are_not_finite_stay_strict_json", f"{TRAINING}::test_the_bad_step_is_dumped"],
    ),
    (
        "silent loss of determinism",
        "two runs of one seed are bitwise equal",
        [
            f"{TRAINING}::test_the_seed_fixes_everything_and_another_seed_changes_it",
            f"{TRAINING}::test_a_strict_run_is_the_same_to_the_bit_on_any_number_of_ranks",
        ],
    ),
    # --- processes
    (
        "SIGTERM, SIGINT or SIGUSR1 to all ranks, at a random time",
        "all stop after the same step and save; exit code 75; resuming is bitwise",
        [
            f"{HERE}::test_row_41_signals_at_random_times",
            "tests/test_cli.py::test_a_signal_saves_and_asks_to_be_started_again",
        ],
    ),
    (
        "a second and a third signal",
        "the second is answered, the third ends the process; checkpoints stay valid",
        [f"{HERE}::test_row_42_second_and_third_signal"],
    ),
    ("a signal to one rank only", "all ranks stop after the same step", [f"{HERE}::test_row_43_a_signal_to_one_rank"]),
    (
        "a scheduler that preempts again and again",
        "the weights of an uninterrupted run, bitwise",
        [f"{HERE}::test_row_44_preempted_again_and_again"],
    ),
    (
        "torchrun is killed",
        "its ranks save and end; none is orphaned",
        [
            f"{HERE}::test_row_45_torchrun_is_killed",
            f"{TRAINING}::test_the_end_of_a_parent_with_many_threads_is_heard_of_once",
        ],
    ),
    (
        "a rank dies",
        "the others name it and end",
        [f"{UTILS}::test_the_others_name_a_rank_that_is_lost", f"{HERE}::test_row_47_torchrun_restarts_after_a_death"],
    ),
    (
        "torchrun restarts the group",
        "it resumes by itself, bitwise",
        [
            f"{HERE}::test_row_47_torchrun_restarts_after_a_death",
            f"{UTILS}::test_a_restarted_group_meets_in_a_fresh_key_space",
        ],
    ),
    (
        "a rank hangs",
        "after timeout_s the others name it and end",
        [f"{UTILS}::test_the_others_name_a_rank_that_is_lost"],
        "several GPUs for NCCL, which was not tested",
    ),
    (
        "ranks that differ in settings",
        "refused before the first step; setting and ranks named",
        [f"{HERE}::test_row_49_ranks_that_disagree"],
    ),
    (
        "a wrong launch environment",
        "one line with a fix",
        [
            f"{UTILS}::test_a_broken_environment_is_a_config_error_of_one_line",
            f"{UTILS}::test_a_port_that_nobody_answers_at_is_one_line",
        ],
    ),
    # --- resources, settings, security
    (
        "out of memory",
        "one line with step, size and what to try; no half checkpoint",
        [f"{HERE}::test_row_51_out_of_memory"],
        "a GPU for CUDA's own; here the process's address space is limited",
    ),
    (
        "bad settings",
        "one line, exit code 2, nothing written",
        [f"{CONFIG}::test_bad_flags_cost_one_clear_line", f"{CONFIG}::test_a_corrupt_config_is_one_clear_error"],
    ),
    (
        "names that lead out of the folder",
        "refused; nothing written outside",
        [f"{HERE}::test_row_53_names_that_lead_out"],
    ),
    (
        "logs on a full disk",
        "one warning, training continues",
        [f"{HERE}::test_row_54_a_log_on_a_full_device", f"{TRACKING}::test_a_full_disk_costs_one_warning"],
    ),
    (
        "a sweep is killed",
        "it continues; every run is done once",
        [f"{SWEEP}::test_a_sweep_killed_at_random_moments_completes_with_every_cell_once"],
    ),
    # --- text to shards
    (
        "data text stopped at any chunk, piece, note or shard, or killed",
        "the same bytes after resuming",
        [
            f"{TOKENIZE}::test_broken_off_anywhere",
            f"{TOKENIZE}::test_broken_off_while_moving_out",
            f"{TOKENIZE}::test_killed_and_started_again",
        ],
    ),
    (
        "a note, piece, shard or source of an unfinished corpus damaged or gone",
        "not trusted; the same bytes",
        [f"{TOKENIZE}::test_damage_is_never_trusted", f"{TOKENIZE}::test_file_that_is_gone"],
    ),
    (
        "power cut while tokenizing",
        "data are on the disk before the note that promises them",
        [f"{TOKENIZE}::test_all_is_on_the_disk_before_the_note_that_promises_it"],
    ),
    ("disk full while tokenizing", "one line, no hole", [f"{TOKENIZE}::test_disk_that_is_full_leaves_no_hole"]),
    (
        "a bad record is fixed, or the text changes while broken off",
        "continues there, or reads again from the change",
        [
            f"{TOKENIZE}::test_mended_text_is_gone_on_with",
            f"{TOKENIZE}::test_changed_text_is_read_again_from_the_change_on",
            f"{TOKENIZE}::test_tokenizer_is_trained_again_if_its_text_changed",
        ],
    ),
    (
        "a document that the tokenizer cannot encode, or gives up on",
        "named, or skipped and counted; long runs of spaces in pieces",
        [
            f"{TOKENIZE}::test_document_that_cannot_be_encoded",
            f"{TOKENIZE}::test_text_that_the_tokenizer_gives_up_on_is_encoded_in_pieces",
            f"{TOKENIZE}::test_skipped_documents_are_counted_and_the_first_are_named",
        ],
    ),
    (
        "broken UTF-8, JSON or gzip, UTF-16, a null",
        "file and line, or row, named",
        [f"{DOCUMENTS}::test_bad_documents_are_named_one_by_one", f"{DOCUMENTS}::test_null_in_parquet"],
    ),
    (
        "byte order marks, blank first lines, slow pipes",
        "dropped; records stay records",
        [f"{DOCUMENTS}::test_byte_order_marks_and_blank_lines", f"{DOCUMENTS}::test_slow_pipe"],
    ),
    (
        "suffixes in capitals, links, other files, FIFOs, folders that may not be read",
        "read, or counted and named",
        [
            f"{DOCUMENTS}::test_suffixes_of_any_case_and_what_is_left_out",
            f"{DOCUMENTS}::test_folder_that_may_not_be_read",
            f"{DOCUMENTS}::test_fifo_is_not_waited_for",
        ],
    ),
    ("names that are not UTF-8", "printed as escapes", [f"{TOKENIZE}::test_names_that_are_not_utf8"]),
    (
        "endless lines, small files that decode to gigabytes",
        "bounded memory; one line",
        [
            f"{DOCUMENTS}::test_line_without_end_is_a_bad_document",
            f"{DOCUMENTS}::test_kilobytes_of_parquet_stay_small",
            f"{DOCUMENTS}::test_page_that_decodes_to_very_much",
        ],
    ),
    (
        "--out that is the working folder, a link or a mount point; --out that cannot be",
        "works; one line before the work",
        [
            f"{TOKENIZE}::test_out_that_is_the_working_folder_or_a_link",
            f"{TOKENIZE}::test_out_that_is_a_mount_point",
            f"{TOKENIZE}::test_out_that_will_not_do_is_refused_before_the_work",
        ],
        "root, to mount a small tmpfs",
    ),
    (
        "the same text with another share for validation",
        "the smaller one is a part of the larger; no document on both sides",
        [f"{TOKENIZE}::test_a_smaller_validation_is_a_part_of_a_larger_one"],
    ),
    (
        "a hub that sends without end, trickles, loops or lists nonsense",
        "stops at the listed size and at a minimum rate, one line",
        [
            f"{FINEWEB}::test_stops_with_one_line",
            f"{FINEWEB}::test_damaged_listing",
            f"{FINEWEB}::test_listing_that_is_no_json",
            f"{FINEWEB}::test_commit_that_is_none",
            f"{FINEWEB}::test_pages",
        ],
    ),
    (
        "names of a listing that lead out, links in place of downloads",
        "nothing is written outside",
        [f"{FINEWEB}::test_names_that_lead_out_are_no_shards", f"{FINEWEB}::test_link_in_place_of_a_partial_download"],
    ),
    (
        "a package that is missing, broken or shadowed by a folder",
        "one line with the command that installs it",
        [
            f"{PACKAGES}::test_one_line_for_each_way_to_be_missing",
            f"{PACKAGES}::test_folder_in_the_working_folder_does_not_pass_for_a_package",
        ],
    ),
    # --- corpora
    (
        "a shard that is not the manifest's",
        "one line and exit code 3, before its first token or before the run finishes",
        [
            f"{TRAINING}::test_shard_that_is_not_the_manifests_ends_a_run",
            f"{SHARDS}::test_large_shard_is_bound_while_it_is_read",
            f"{SHARDS}::test_shard_replaced_while_its_file_was_closed",
        ],
    ),
    (
        "a FineWeb shard replaced by another of its size",
        "another fingerprint; former fingerprints still resume",
        [
            f"{SHARDS}::test_upstream_shard_replaced_by_another_of_its_size",
            f"{TRAINING}::test_a_run_on_upstreams_shards_resumes_by_its_former_fingerprint",
        ],
    ),
    (
        "an edited, damaged or special manifest",
        "not believed; one line without escapes, no wait",
        [
            f"{SHARDS}::test_fingerprint_in_a_manifest_is_not_believed",
            f"{SHARDS}::test_bad_manifest",
            f"{SHARDS}::test_special_files_in_a_received_folder",
        ],
    ),
    ("more shards than files may be open", "it trains", [f"{DATA}::test_more_shards_than_files_may_be_open"]),
    (
        "text that is in training and in validation",
        "for one side only, counted, across mixed corpora too",
        [
            f"{DATA}::test_documents_that_another_part_trains_on_are_not_validated_on",
            f"{CORPUS}::test_passage_of_both_parts_is_for_validation_only",
        ],
    ),
    (
        "less validation than asked, or in a part of a mixture",
        "said; the part keeps its weight; none at all is refused",
        [
            f"{TRAINING}::test_a_run_says_its_order_and_a_validation_smaller_than_asked",
            f"{DATA}::test_part_with_little_validation_keeps_its_weight",
            f"{DATA}::test_part_without_validation_is_refused",
        ],
    ),
    ("one long document", "used whole", [f"{DATA}::test_one_long_document_is_used_whole"]),
    ("no home folder", "one line", [f"{SHARDS}::test_no_home_folder"]),
    # --- runs that are not what they claim
    (
        "widths or seeds are copies, up to rounding, an offset or jitter",
        "refused and named; honest noise is not",
        [
            f"{CLAIMS}::test_copies_are_refused_and_named",
            f"{CLAIMS}::test_copies_in_one_arm_are_named_with_it",
            f"{CLAIMS}::test_honest_noise_is_not_refused",
        ],
    ),
    ("a run is in a table twice", "refused", [f"{CLAIMS}::test_a_run_that_is_there_twice_is_refused"]),
    (
        "a finite loss that exploded",
        "has diverged, and is noted",
        [f"{CLAIMS}::test_an_exploded_run_has_diverged_though_it_is_finite"],
    ),
    (
        "columns that differ and are not used",
        "named; INCONCLUSIVE, or refused where they split equal rows",
        [
            f"{CLAIMS}::test_settings_that_should_be_equal_and_differ_make_inconclusive",
            f"{CLAIMS}::test_a_column_that_splits_a_place_is_named",
        ],
    ),
    (
        "columns with other names, no seeds",
        "the error shows --columns, which reads them",
        [f"{CLAIMS}::test_columns_may_be_called_otherwise"],
    ),
    (
        "numbers out of range, seeds beyond 2^53, names that cannot be printed",
        "one line; seeds to the last digit",
        [
            f"{CLAIMS}::test_numbers_out_of_range_are_one_line",
            f"{CLAIMS}::test_seeds_are_told_apart_to_the_last_digit",
            f"{CLAIMS}::test_an_arm_has_a_name_that_can_be_printed",
        ],
    ),
    (
        "tables that are huge or no files",
        "right or one line, in seconds",
        [
            f"{CLAIMS}::test_a_table_that_is_no_file_or_too_large_is_one_line",
            f"{CLAIMS}::test_many_rows_columns_and_arms_are_fast_or_one_line",
        ],
    ),
    (
        "a sweep with missing runs",
        "counted, named, INCONCLUSIVE",
        [f"{SWEEP}::test_missing_runs_are_counted_and_named_and_nothing_passes"],
    ),
    (
        "runs of several codes, versions, devices or dtypes",
        "said at the start, named, INCONCLUSIVE",
        [
            f"{SWEEP}::test_runs_that_were_made_differently_are_named_and_nothing_passes",
            f"{SWEEP}::test_a_sweep_that_goes_on_under_other_code_says_so",
        ],
    ),
    (
        "a flag that disagrees with an arm",
        "one line that names the arms",
        [f"{SWEEP}::test_flags_that_a_sweep_cannot_follow_are_one_line"],
    ),
    (
        "strange or hostile files of a sweep, links in it",
        "one line; nothing followed",
        [
            f"{SWEEP}::test_a_strange_result_is_one_line",
            f"{SWEEP}::test_a_strange_definition_is_one_line",
            f"{SWEEP}::test_links_in_a_received_folder_are_not_followed",
        ],
    ),
    ("disk full while the table is written", "the old table stays", [f"{SWEEP}::test_the_table_is_replaced_whole"]),
    (
        "a Ray of ours on all addresses",
        "on the loopback only, or refused",
        [f"{SWEEP}::test_ray_of_our_own_listens_on_the_loopback_only"],
        "the extra ray, for the whole of it",
    ),
    # --- the muP library
    (
        "a readout that shares the embedding, however it was tied",
        "right, or one line that names MuSharedReadout",
        [
            f"{UNUSUAL}::test_a_tie_by_assignment_leaves_the_embedding_alone",
            f"{UNUSUAL}::test_a_tie_made_later_is_one_too",
            f"{UNUSUAL}::test_an_embedding_that_takes_the_start_of_a_readout_is_refused",
            f"{UNUSUAL}::test_a_tied_linear_layer_is_told_of_the_shared_readout",
            f"{UNUSUAL}::test_a_tie_by_memory_only_is_refused",
        ],
    ),
    (
        "tensors without a certain role",
        "one line, and what it advises works",
        [
            f"{UNUSUAL}::test_a_bare_matrix_to_or_from_a_finite_size_has_to_be_declared_and_the_message_says_how",
            f"{UNUSUAL}::test_a_projection_of_an_lstm_has_to_be_declared",
            f"{UNUSUAL}::test_attention_with_its_own_sizes_of_keys",
            f"{UNUSUAL}::test_bilinear_layers_have_two_sides_to_read_from",
        ],
    ),
    (
        "parametrized layers",
        "factors kept, or one line",
        [
            f"{UNUSUAL}::test_a_hidden_matrix_keeps_its_factor_under_what_computes_it",
            f"{UNUSUAL}::test_norms_that_do_not_fit_mup_are_refused",
            f"{UNUSUAL}::test_the_magnitude_of_weight_norm_may_not_grow",
        ],
    ),
    ("wrappers before set_base_shapes", "names match", [f"{UNUSUAL}::test_wrapped_parts_and_wrapped_models"]),
    (
        "groups added to an optimizer later, other optimizers",
        "scaled, or one line",
        [
            f"{UNUSUAL}::test_a_group_that_is_added_later_is_scaled_like_the_first",
            f"{UNUSUAL}::test_a_copied_optimizer_steps_and_refuses_to_guess",
            f"{UNUSUAL}::test_optimizers_whose_step_or_eps_is_of_another_kind",
            f"{UNUSUAL}::test_zero_redundancy_optimizer",
            f"{UNUSUAL}::test_muon_names_the_convolution_that_it_cannot_take",
        ],
    ),
    (
        "a checkpoint in a plain model or under another base",
        "one line; fold gives a plain model with equal logits",
        [
            f"{UNUSUAL}::test_a_state_dict_is_refused_by_a_plain_model_and_under_another_base",
            f"{UNUSUAL}::test_distributed_state_dicts_are_checked_too",
            f"{UNUSUAL}::test_fold_gives_a_plain_model_with_equal_logits",
            f"{UNUSUAL}::test_an_adapter_around_a_readout_is_told_to_go_on_a_folded_model",
        ],
    ),
    (
        "damaged base shapes, odd arguments, 200 random modules",
        "one line; no wrong role",
        [
            f"{UNUSUAL}::test_a_damaged_file_of_base_shapes_is_one_line",
            f"{UNUSUAL}::test_what_is_no_file_of_base_shapes_is_one_line",
            f"{UNUSUAL}::test_odd_arguments_are_one_line",
            f"{FUZZ}::test_random_modules",
        ],
    ),
    # --- reports
    (
        "a rate that does not hold",
        "is not recommended; one that does comes first",
        [
            f"{REPORT}::test_a_rate_that_does_not_hold_is_not_recommended",
            f"{REPORT}::test_a_report_begins_with_what_to_do",
        ],
    ),
    (
        "a page at 360, 768 and 1400 pixels",
        "no sideways scroll, no word broken, no label over another",
        [
            f"{REPORT}::test_no_window_needs_sideways_scrolling_and_figures_fill_it",
            f"{REPORT}::test_no_word_of_a_table_is_broken_on_a_phone",
            f"{REPORT}::test_no_label_of_a_figure_lies_over_another",
        ],
        "Chromium",
    ),
    ("characters that no font has", "escapes, no boxes", [f"{PICTURES}::test_a_font_of_boxes_is_no_font"]),
    # --- pictures, trackers, the terminal
    (
        "a disk that was full has room again",
        "one warning; log.txt, status.json, a resume and doctor report the gap; no torn line",
        [f"{TRACKING}::test_a_full_disk_costs_one_warning", f"{DOCTOR}::test_a_gap_in_the_metrics_is_told"],
    ),
    (
        "a tracker raises anything, or hangs",
        "switched off in one line; the process ends with the run's code",
        [
            f"{TRACKING}::test_a_tracker_that_raises_is_switched_off_in_one_line",
            f"{TERMINAL}::test_a_tracker_that_hangs_does_not_keep_the_process",
        ],
    ),
    (
        "TensorBoard after a resume",
        "no step twice",
        [f"{TRACKING}::test_tensorboard_hides_what_a_dead_life_mirrored"],
        "the extra tensorboard",
    ),
    (
        "stdout or stderr full, closed, broken or of another encoding",
        "a run finishes with exit code 0; a command that only prints says so, exit code 1",
        [
            f"{TERMINAL}::test_no_terminal_ends_a_run_or_changes_its_exit_code",
            f"{TERMINAL}::test_a_command_that_only_prints_says_when_that_is_lost",
        ],
    ),
    (
        "odd settings of matplotlib, odd names in a picture",
        "the picture is drawn",
        [
            f"{PICTURES}::test_no_setting_of_the_user_s_matplotlib_breaks_a_picture",
            f"{PICTURES}::test_any_name_can_be_a_title",
            f"{PICTURES}::test_characters_without_a_font_are_escapes_and_no_boxes",
        ],
    ),
    (
        "a report's picture fails",
        "the rest is written, one line, exit code 1",
        [f"{REPORT}::test_what_can_be_written_is_written_and_the_rest_is_one_line"],
    ),
    # --- received folders
    (
        "links in a folder of a run, a sweep or a report",
        "nothing outside is written or removed",
        [
            f"{TRACKING}::test_nothing_is_written_through_a_link_or_into_a_fifo",
            f"{CHECKPOINT}::test_nothing_is_written_or_removed_through_a_link",
            f"{REPORT}::test_a_report_follows_no_link_inside_a_folder_that_may_be_anybody_s",
            f"{DOCTOR}::test_links_and_fifos_of_a_received_folder_are_findings",
        ],
    ),
    (
        "a FIFO, device or sparse file in a checkpoint; a sealed lie",
        "damage, no wait",
        [
            f"{CHECKPOINT}::test_what_is_no_regular_file_is_damage_and_no_wait",
            f"{CHECKPOINT}::test_a_sealed_manifest_of_any_types_is_one_line",
        ],
    ),
    (
        "any small file of a run damaged",
        "every command answers in a line",
        [
            f"{DAMAGED}::test_a_damaged_small_file_is_told_in_a_line_by_every_command",
            f"{TRACKING}::test_a_line_that_no_run_writes_is_named_unless_it_is_the_last",
        ],
    ),
    ("names with Markdown, HTML or escapes", "they stay text", [f"{REPORT}::test_no_name_acts_as_markdown"]),
    (
        "the code changes while a run trains",
        "the hash is of the code that ran",
        [f"{TRACKING}::test_the_hash_of_the_source_is_taken_once"],
    ),
    # --- the life of a run
    (
        "rates of 1e6, 1e30 or 1e37, under any policy",
        "exit code 5, status diverged, no bad checkpoint",
        [
            f"{DIVERGENCE}::test_weights_that_explode_end_a_run_under_every_policy",
            f"{DIVERGENCE}::test_a_model_that_saturates_for_ever_diverged_though_its_loss_is_no_higher",
            f"{DIVERGENCE}::test_a_short_honest_run_did_not_diverge",
        ],
    ),
    (
        "a loss that ends above its start",
        "the same; the last good checkpoint is kept",
        [f"{DIVERGENCE}::test_a_run_that_ends_above_where_it_began_keeps_its_last_good_checkpoint"],
    ),
    (
        "an extended run is interrupted",
        "continues bit for bit",
        [f"{RUN_FOLDER}::test_an_extended_run_that_is_interrupted_goes_on_to_the_bit"],
    ),
    (
        "weights to begin from that do not fit",
        "one line; the name stays free",
        [f"{RUN_FOLDER}::test_weights_that_do_not_fit_are_refused_in_one_line_and_leave_the_name_free"],
    ),
    (
        "the data moved; the type that auto chooses changed; the code changed",
        "resumes, and says so",
        [
            f"{RUN_FOLDER}::test_data_that_moved_are_known_by_their_fingerprint",
            f"{RUN_FOLDER}::test_a_type_that_auto_chooses_may_change_with_the_device",
            f"{RUN_FOLDER}::test_other_code_is_told_of_and_goes_on",
        ],
    ),
    (
        "--resume auto among runs in use, foreign, behind FIFOs or damaged; several jobs; several ranks",
        "each left out with a line; each job its own run; all ranks the same",
        [
            f"{RUN_FOLDER}::test_a_run_is_left_out_that_is_in_use_of_other_settings_unreadable_or_diverged",
            f"{RUN_FOLDER}::test_each_of_several_jobs_takes_a_run_of_its_own",
            f"{RUN_FOLDER}::test_all_ranks_take_the_run_that_rank_0_locked",
        ],
    ),
    (
        "a live folder is renamed, its name taken, or it is deleted",
        "followed, the other run untouched; or one line",
        [
            f"{RUN_FOLDER}::test_a_run_goes_on_in_its_folder_when_that_is_renamed",
            f"{RUN_FOLDER}::test_a_folder_that_is_gone_ends_the_run_in_one_line",
        ],
    ),
    (
        "tasks of srun without a launcher; a job that Slurm preempts",
        "refused in one line; requeued only if stopped",
        [
            f"{UTILS}::test_a_task_of_several_that_knows_of_no_other_is_refused",
            f"{SLURM}::test_the_job_script_requeues_a_run_that_was_stopped",
        ],
    ),
    (
        "other programs on the cores",
        "threads do not spin",
        [f"{CLI}::test_openmp_is_told_to_wait_without_spinning_before_torch_is_loaded"],
    ),
    # --- the command line
    (
        "flags and commands of other programs",
        "answered by their meaning, one line",
        [f"{FLAGS}::test_flags_of_other_programs_are_answered_by_their_meaning"],
    ),
    (
        "numbers that are none, of 22 or 5,000 digits, hexadecimal or nan",
        "one short line, exit code 2",
        [f"{FLAGS}::test_whatever_is_no_whole_number_or_too_large_costs_one_short_line"],
    ),
    (
        "paths that begin at home, with and without one",
        "expanded; one line",
        [f"{FLAGS}::test_a_path_may_begin_at_home", f"{FLAGS}::test_without_a_home_the_sign_for_it_is_refused"],
    ),
    (
        "the same flags under another preset",
        "the same rules",
        [f"{CONFIG}::test_flags_and_not_the_preset_decide_on_the_rules"],
    ),
    (
        "Ctrl-C while modules are imported, or at any moment",
        "one line, no traceback",
        [
            f"{ENTRY}::test_ctrl_c_while_modules_are_imported_is_one_line",
            f"{ENTRY}::test_ctrl_c_at_any_moment_is_one_line",
        ],
    ),
    (
        "a plan whose budget is too small; a question without a folder",
        "the smallest budget and its command; nothing written",
        [
            f"{PLAN}::test_a_budget_that_is_too_small_is_told_what_is_enough",
            f"{PLAN}::test_what_if_leaves_nothing_behind",
        ],
    ),
    (
        "a command in the documentation that fails",
        "its test fails",
        [f"{DOCS}::test_the_commands_of_a_page_work_one_after_the_other"],
    ),
    # --- small and received texts
    (
        "a text so small that no document falls into a part; a single document",
        "each part gets one; one line",
        [
            f"{TOKENIZE}::test_each_part_has_a_document",
            f"{TOKENIZE}::test_one_document_cannot_be_both",
            f"{DATA}::test_uses_of_a_book",
        ],
    ),
    (
        "links or FIFOs in an unfinished corpus, or in its place",
        "not followed, not waited for",
        [
            f"{TOKENIZE}::test_nothing_in_a_received_folder_is_followed_or_waited_for",
            f"{TOKENIZE}::test_unfinished_folder_that_is_a_link",
        ],
    ),
    (
        "corpora and unfinished work of the first version",
        "read, or one line",
        [f"{TOKENIZE}::test_what_an_earlier_version_left"],
    ),
    (
        "a tokenizer that is not the manifest's; a shard replaced by one of its size and time",
        "one line",
        [
            f"{TOKENIZERS}::test_tokenizer_that_does_not_fit_the_manifest",
            f"{SHARDS}::test_shard_replaced_by_one_of_its_size_and_time",
        ],
    ),
    (
        "very deep folders; standard input closed",
        "read; one line",
        [f"{DOCUMENTS}::test_very_deep_folders", f"{DOCUMENTS}::test_standard_input_that_is_closed"],
    ),
    # --- tables of one's own
    (
        "settings that differ, also under a tracker's prefixes; rules of width, spellings, identifiers",
        "INCONCLUSIVE and named; no doubt",
        [
            f"{CLAIMS}::test_further_columns_matter_if_they_are_settings",
            f"{CLAIMS}::test_a_diverged_run_may_have_ended_early",
            f"{CLAIMS}::test_of_two_columns_with_one_name_both_count",
        ],
    ),
    (
        "a program that ignores the width, with fresh noise; seeds that are names",
        "a note",
        [f"{CLAIMS}::test_widths_that_are_alike_but_for_noise_are_a_note", f"{CLAIMS}::test_seeds_may_have_names"],
    ),
    (
        "points of a grown grid that failed for all seeds; a corpus known by a former fingerprint",
        "missing until they are run; continues, same ids",
        [
            f"{SWEEP}::test_points_that_a_grid_grew_by_and_that_failed_for_all_seeds_are_missing",
            f"{SWEEP}::test_a_folder_that_knows_the_corpus_by_its_former_fingerprint_goes_on",
        ],
    ),
    (
        "a report on another program's table",
        "says only what the table holds",
        [f"{REPORT}::test_of_a_strangers_table_only_what_it_tells_is_said"],
    ),
    # --- busy, suspended and read-only machines
    (
        "torch loaded before us without a wait policy, on busy cores",
        "threads sleep soon while they wait",
        [f"{HARDWARE}::test_threads_sleep_while_they_wait_where_torch_was_loaded_before_us"],
    ),
    (
        "all ranks suspended for longer than timeout_s",
        "over gloo the collective continues; a rank that hangs is still named, exit code 6",
        [
            f"{UTILS}::test_the_time_in_which_a_whole_group_was_suspended_does_not_count",
            f"{UTILS}::test_a_process_that_lost_a_rank_ends_though_gloo_waits_on",
        ],
        "several GPUs for NCCL, whose own clock decides",
    ),
    (
        "a run's folder on a read-only disk",
        "one line with advice that helps, also for a resume",
        [f"{RUN_FOLDER}::test_a_run_on_a_disk_that_is_read_only_is_told_what_helps"],
        "root, to mount a small tmpfs",
    ),
    # --- what a first hour brings
    (
        "a log, a Makefile, a source tree as text",
        "read, with --suffix in folders; one line that counts what was passed over; at least 90 % used per epoch",
        [
            f"{DOCUMENTS}::test_named_files_of_any_suffix_are_plain_text",
            f"{TOKENIZE}::test_text_command_on_a_source_tree",
            f"{TOKENIZE}::test_an_epoch_of_the_laptop_preset_uses_own_text",
        ],
    ),
    (
        "a small text at the default share of validation",
        "16 documents, a fifth at most",
        [f"{TOKENIZE}::test_validation_of_a_small_text", f"{TOKENIZE}::test_vocabulary_that_the_text_is_too_short_for"],
    ),
    (
        "the command that a report names",
        "runs as it stands",
        [
            f"{TRANSFER_COMMAND}::test_the_command_that_a_report_names_measures_the_same",
            f"{REPORT}::test_a_forecast_of_a_sweep_gives_a_flag_to_paste",
        ],
    ),
    (
        "an interval so wide that it cannot miss; a PASS without a control",
        "the miss and the reason are printed; the headline says so",
        [
            f"{PLAN}::test_a_wide_interval_is_explained",
            f"{REPORT}::test_a_pass_without_a_control_says_so_in_the_headline",
        ],
    ),
    (
        "a plan of several sweeps is run or resumed",
        "one counter over the plan",
        [f"{PLAN}::test_progress_is_counted_over_the_whole_plan"],
    ),
    (
        "a layer declared as the readout; a message to paste",
        "starts by the table; works as pasted",
        [
            f"{UNUSUAL}::test_a_declared_linear_layer_starts_by_the_table",
            f"{UNUSUAL}::test_the_line_for_a_tied_linear_layer_works_as_it_is_written",
            f"{UNUSUAL}::test_the_line_for_a_last_convolution_works_and_starts_it_as_a_readout",
            f"{UNUSUAL}::test_all_layers_of_the_kind_are_counted_at_once",
        ],
    ),
    (
        "a device in place of a file to write",
        "refused, also for root",
        [f"{FILES}::test_no_device_is_replaced"],
        "root",
    ),
)
