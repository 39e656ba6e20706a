"""A model in other programs' formats, and back; files that mean harm."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from test_checkpoint import model_of, save

from speedrun_mup.cli import main
from speedrun_mup.export.dcp import export_dcp, import_dcp
from speedrun_mup.export.record import export_pt, import_pt
from speedrun_mup.training import train
from speedrun_mup.training.checkpoint import CheckpointError, check_match
from speedrun_mup.training.load import load_run


def test_pt_round_trip(tmp_path):
    path = save(tmp_path, 3)
    out = tmp_path / "model.pt"
    for _ in range(2):
        export_pt(path, out)
    plain = torch.load(out, weights_only=True)
    assert list(plain) == ["step", "model"] and plain["step"] == 3
    back = import_pt(out)
    check_match(back, model_of(3))
    assert all(torch.equal(back[name], tensor) for name, tensor in model_of(3).items())
    torch.save({"step": 1, "code": "", "model": {"_orig_mod.embed": torch.ones(2)}}, out)
    assert list(import_pt(out)) == ["embed"]
    for content in ({"weights": 1}, torch.ones(1), {"model": {"w": 1}}):
        torch.save(content, out)
        with pytest.raises(CheckpointError, match="no state dict"):
            import_pt(out)
    for text in (b"", b"PK\x03\x04 not a zip", b"\x80\x02."):
        out.write_bytes(text)
        with pytest.raises(CheckpointError, match=r"not a \.pt file"):
            import_pt(out)
    export_pt(path, tmp_path / "new folder" / "model.pt")
    with pytest.raises(CheckpointError, match="ENOTDIR|EEXIST"):
        export_pt(path, out / "no folder" / "model.pt")


def test_dcp_round_trip(tmp_path):
    path = save(tmp_path, 3)
    export_dcp(path, tmp_path / "dcp")
    back = import_dcp(tmp_path / "dcp", trusted=True)
    check_match(back, model_of(3))
    assert all(torch.equal(back[name], tensor) for name, tensor in model_of(3).items())
    with pytest.raises(CheckpointError, match="would overwrite"):
        export_dcp(path, tmp_path / "dcp")


def test_a_pt_file_and_a_dcp_folder_of_any_kind_are_one_line(tmp_path):
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="it is a FIFO"):
        import_pt(tmp_path / "a.pt")
    torch.save({"model": {3: torch.ones(1)}}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="has no state dict"):
        import_pt(tmp_path / "b.pt")
    (tmp_path / "dcp").mkdir()
    with pytest.raises(CheckpointError, match="is not a folder of torch.distributed.checkpoint") as caught:
        import_dcp(tmp_path / "dcp", trusted=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="ENOTDIR|EEXIST") as caught:
        export_dcp(save(tmp_path / "c", 1), tmp_path / "a.pt" / "x")
    assert "\n" not in str(caught.value) and str(caught.value).endswith("make room, or name another place")


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The disk takes `size` bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tiny, tmp_path, capsys):
    """The line names what was asked for, not what it is called while it is written."""
    folder, out = train(tiny(name="a", data="embedded", width=32)).folder, tmp_path / "new" / "out"
    out.parent.mkdir()
    for to in ("pt", "dcp", "hf"):
        capsys.readouterr()
        with files_up_to(50_000):
            assert main(["export", str(folder), "--to", to, str(out)]) == 4
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.endswith("; make room, or name another place\n"), said
        assert str(out) in said and ".tmp" not in said and said.count("\n") == 1
        assert not list(out.parent.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.slow
def test_the_command_writes_what_it_is_asked_for_and_nothing_over_it(tiny, tmp_path, capsys):
    folder, out = train(tiny(name="a", width=32, save_every=3)).folder, tmp_path / "model.pt"
    assert main(["export", str(folder), "--to", "pt", str(out), "--checkpoint", "3"]) == 0
    assert f"step 3 of {folder} is written to {out}" in capsys.readouterr().out
    back, own = import_pt(out), load_run(folder, step=3, device="cpu").model.state_dict()
    assert torch.equal(back["lm_head.weight"], own["lm_head.weight"])
    for words, says in (
        (["--to", "pt", str(out)], f"{out} exists; name a new one"),
        (["--to", "onnx", str(tmp_path / "x")], "invalid choice: 'onnx'"),
        (["--to", "pt", str(tmp_path / "x"), "--checkpoint", "4"], "has no checkpoint of step 4; it has 3, 6"),
        (["--to", "pt"], "the following arguments are required: OUT"),
        ([str(tmp_path / "x")], "the following arguments are required: --to"),
    ):
        assert main(["export", str(folder), *words]) in (2, 3, 4)
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1, said
    assert not (tmp_path / "x").exists()


def test_a_flag_that_a_format_does_not_read_is_refused(tmp_path, capsys):
    for to, flag in (
        ("dcp", "--multipliers fold"),
        ("dcp", "--run-data x"),
        ("pt", "--run-data x"),
        ("pt", "--data x"),
    ):
        assert main(["export", str(tmp_path), str(tmp_path / "out"), "--to", to, *flag.split()]) == 2
        shown = flag.split()[0].replace("--data", "--run-data")  # its former name
        assert f"{shown} changes nothing with --to {to}; leave it out" in capsys.readouterr().err
