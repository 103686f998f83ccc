"""Test the messages of a run on its bank and its negatives."""

import threading
import traceback

import pytest

from contrastive.callbacks.watch_mining import WatchMining
from memory_bank.lookahead import LookAhead
from tests.contrastive.pretrain.runs import bank, metrics, same, table, weights


def test_a_run_without_negatives_says_which_filter_drops_them_and_stops(run):
    code, result, err = run("mining.relative_margin=1e6")
    assert code == 3
    assert not result["finished"]
    assert (
        err.count("has a negative: nothing is learnt. Of the bank's rows mining.relative_margin drops 100")
        == 1
    )
    assert "stopped: no query had a negative for 6 optimizer steps" in err


def test_a_band_that_is_widened_is_said_at_the_start(run):
    _, _, err = run("mining.band=[0.5,0.51]", "mining.num_hard=20", "trainer.max_steps=1")
    (line,) = [line for line in err.splitlines() if "mining.band" in line]
    assert "mining.num_hard=20 widens it" in line


def test_a_method_that_does_not_mine_says_nothing_of_mining(run, tmp_path):
    code, _, err = run("mining.num_hard=20", "method=simclr", "trainer.max_steps=2", "logging.mined_rows=4")
    assert code == 0
    assert "widens it" not in err
    assert "dataset bank" not in err
    assert "mined" not in err
    assert [name for name in metrics(tmp_path / "runs/tiny")[-1] if name.startswith("mining/")] == []
    assert table(tmp_path / "runs/tiny/mined.csv")


def test_a_bank_that_is_not_to_be_mined_is_no_fault(run):
    code, _, err = run("mining.method=in_batch")
    assert code == 0
    assert "mined" not in err
    assert "row of the bank" not in err


def test_looking_ahead_on_a_thread_changes_no_bit_of_a_run(run, tmp_path):
    """Symmetric loss and accumulation included; the overlapped run is stopped and resumed as well."""
    settings = ["mining.query=stored", "mining.lag=2", "objective.symmetric=true"]
    settings += ["trainer.accumulate_grad_batches=2"]
    run("run.name=plain", *settings)
    overlapped = ["run.name=overlapped", "mining.overlap=true", *settings]
    run(*overlapped, "trainer.max_steps=5", "run.checkpoint_every=5")
    assert run(*overlapped)[0] == 0
    plain, overlapped = tmp_path / "runs/plain", tmp_path / "runs/overlapped"
    assert same(weights(plain), weights(overlapped))
    assert same(bank(plain), bank(overlapped))
    assert any(float(row["mining/similarity_mean"] or "nan") < 1 for row in metrics(plain))


def test_a_look_up_that_fails_on_its_thread_stops_the_run_with_its_own_traceback(run, monkeypatch):
    issue, on_threads = LookAhead.issue, set()

    def broken_issue(self, step):
        on_threads.add(threading.current_thread().name)
        if step == 7:
            raise ZeroDivisionError("the index broke")
        issue(self, step)

    monkeypatch.setattr(LookAhead, "issue", broken_issue)
    with pytest.raises(ZeroDivisionError, match="the index broke") as caught:
        run("mining.query=stored", "mining.overlap=true")
    assert "broken_issue" in "".join(traceback.format_exception(caught.value))
    assert on_threads == {"look-ahead"}
    assert "look-ahead" not in {thread.name for thread in threading.enumerate()}


def test_a_bank_that_the_run_cannot_fill_is_named_at_the_start_and_at_the_end(run):
    code, result, err = run("bank.kind=queue", "bank.capacity=1000")
    assert code == 0
    assert result["bank_used"] is False
    lines = err.splitlines()
    (start,) = [number for number, line in enumerate(lines) if "the bank is never mined" in line]
    assert "lower bank.capacity to 440 or less" in lines[start]
    assert "queue bank of 1000" in "".join(lines[start:])
    assert err.count("no row of the bank was a negative in any of the 12 steps: it is filled to 9.6%") == 1
    _, result, err = run("run.name=fits", "bank.kind=queue", "bank.capacity=440")
    assert result["bank_used"] is True
    assert "the bank" not in err.replace("the bank starts empty", "")


def test_a_bank_that_unreadable_images_keep_from_filling_is_named_once(run, folder, tmp_path):
    (folder / "red" / "torn.png").write_bytes(b"no image")
    more = ("mining.min_fill=1", "data.max_corrupt=0.2", "data.name=images", "schedule.epochs=5")
    code, _, err = run(*more, "trainer.max_steps=23")
    assert (code, "in any of the" in err) == (0, False)  # the run is continued
    code, result, err = run(*more)
    assert code == 0
    assert result["bank_used"] is False
    assert err.count("no row of the bank has been a negative: it is filled to 98.0%, mining.min_fill=1") == 1
    assert "Set mining.min_fill=0.97 or less" in err
    assert err.count(f"no row of the bank was a negative in any of the {result['steps']} steps") == 1


def test_whether_the_bank_was_used_survives_a_resume(run):
    run("trainer.max_steps=11")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WatchMining, "on_step", lambda *_: None)
        assert run()[1]["bank_used"] is True
