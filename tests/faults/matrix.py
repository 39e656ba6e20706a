"""The fault matrix: every fault that a run must survive or name, and the tests that inject it for real."""

from __future__ import annotations

from dataclasses import dataclass

HERE, CHECKPOINT, TRAINING, UTILS = (
    f"tests/{name}.py" for name in ("faults/test_matrix", "test_checkpoint", "test_training", "test_utils")
)
DATA, SHARDS, CORPUS, CONFIG, TRACKING, SWEEP = (
    f"tests/test_{name}.py" for name in ("data", "shards", "corpus", "config", "tracking", "sweep")
)


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
        "a warning with needed and free bytes, training goes on, the next save works once there is space",
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
        "purge with incomplete and damaged folders beside",
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
        "bitwise the same with --strict; one that does not divide the batch is refused",
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
        "shards replaced between two lives",
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
        "after --timeout-s the others name it and end",
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
        "one warning, training goes on",
        [f"{HERE}::test_row_54_a_log_on_a_full_device", f"{TRACKING}::test_a_full_disk_costs_one_warning"],
    ),
    (
        "a sweep is killed",
        "it goes on; every run is done once",
        [f"{SWEEP}::test_a_sweep_killed_at_random_moments_completes_with_every_cell_once"],
    ),
)
