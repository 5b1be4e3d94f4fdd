"""The losses of digits and of small VITS are those that were committed (see tests/golden/record.py)."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.golden.record import TOLERANCES, UPDATES, differences, is_exact

ROOT = Path(__file__).resolve().parents[1]
# the kernels of a processor of 2008
OLD = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}


def golden(name: str) -> dict:
    """The committed record."""
    return json.loads((ROOT / "tests" / "golden" / f"{name}.json").read_text(encoding="utf8"))


def computed(name: str, folder: Path, **environment: str) -> dict:
    """A record made now, by a process of its own, since torch chooses its kernels when it is imported."""
    command = [sys.executable, "-m", "tests.golden.record", name, "--output", str(folder / "found.json")]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "found.json").read_text(encoding="utf8"))


@pytest.mark.parametrize("name", ["digits", pytest.param("vits", marks=pytest.mark.slow)])
def test_the_losses_are_those_that_were_committed(name, tmp_path):
    found = computed(name, tmp_path)
    problems = differences(golden(name), found)
    assert not problems, "\n".join(problems[:10])


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="there are no simpler kernels")
def test_another_processor_is_compared_by_the_tolerance(tmp_path):
    """Its losses are others in the last bits, and would not pass for equal."""
    expected, found = golden("digits"), computed("digits", tmp_path, **OLD)
    assert found["arithmetic"]["instructions"].startswith("DEFAULT ONEDNN_MAX_CPU_ISA=SSE41")
    assert not is_exact(expected, found)
    assert differences(expected, found) == []
    assert differences(expected, {**found, "arithmetic": expected["arithmetic"]})


@pytest.mark.parametrize("name", sorted(TOLERANCES))
class TestComparing:
    def changed(self, name: str, by: float, update: int = UPDATES) -> dict:
        """The golden record with the first loss of an update changed by a share of it."""
        record = copy.deepcopy(golden(name))
        values = next(iter(record["losses"].values()))
        values[update - 1] = (float.fromhex(values[update - 1]) * (1 + by)).hex()
        return record

    def elsewhere(self, record: dict) -> dict:
        return {**record, "arithmetic": {**record["arithmetic"], "processor": "another"}}

    def test_a_record_equals_itself_alone_to_the_last_bit(self, name):
        assert differences(golden(name), golden(name)) == []
        (problem,) = differences(golden(name), self.changed(name, 2**-50))
        assert f", update {UPDATES}: " in problem

    def test_elsewhere_the_tolerance_of_the_update_counts(self, name):
        for last, share in TOLERANCES[name]:
            inside, outside = (self.elsewhere(self.changed(name, share * x, last)) for x in (0.9, 1.1))
            assert differences(golden(name), inside) == []
            assert len(differences(golden(name), outside)) == 1

    def test_what_is_missing_or_not_a_number_is_a_difference(self, name):
        short, fewer, broken = (self.elsewhere(copy.deepcopy(golden(name))) for _ in range(3))
        key = next(iter(short["losses"]))
        short["losses"][key].pop()
        del fewer["losses"][key]
        broken["losses"][key][0] = "nan"
        assert differences(golden(name), short) == [f"{key}: {UPDATES - 1} updates, not {UPDATES}"]
        assert differences(golden(name), fewer)[0].startswith("losses are ")
        assert len(differences(golden(name), broken)) == 1

    def test_all_losses_of_all_updates_are_there(self, name):
        discriminator = ["loss_0", "loss_disc", "loss_disc_real", "loss_disc_generated"]
        generator = ["loss_1", "loss_gen", "loss_feat", "loss_mel", "loss_dur", "loss_kl"]
        parts = {"digits": ["loss", "accuracy"], "vits": discriminator + generator}
        record = golden(name)
        assert list(record["losses"]) == parts[name]
        assert {len(values) for values in record["losses"].values()} == {UPDATES}
        assert record["arithmetic"]["threads"] == 1
        assert record["tolerances"] == TOLERANCES[name]
