"""recipes/ljspeech as a user starts it: on the demo set, on a folder, on real clips; stopped, continued, speaking."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.provenance import as_a_shell_calls

ROOT = Path(__file__).resolve().parents[2]
TRAIN, SPEAK = (ROOT / "recipes" / "ljspeech" / name for name in ("train_vits.py", "speak_vits.py"))
SHORT = ["--coqpit.plot_step=20", "--coqpit.print_step=1", '--coqpit.test_sentences=["One, two.", "Three four."]']


def run(script: Path, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """A recipe, from any working directory."""
    command, variables = [sys.executable, str(script), *map(str, arguments)], {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)


def mel_losses(output: str) -> list[float]:
    """The training's mel loss, step by step."""
    return [float(loss) for loss in re.findall(r"^step \d+:.* loss_mel (\S+)", output, flags=re.MULTILINE)]


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory) -> tuple[Path, str]:
    """Folder and output of 60 updates with no data set given."""
    if (ROOT / "data" / "LJSpeech-1.1").exists():
        pytest.skip("data/LJSpeech-1.1 is there: without --coqpit.dataset_path it would be trained on")
    folder = tmp_path_factory.mktemp("demo")
    result = run(TRAIN, f"--coqpit.output_path={folder}", "--coqpit.max_steps=60", *SHORT, cwd=folder)
    assert result.returncode == 0, result.stderr
    (run_folder,) = folder.iterdir()
    return run_folder, result.stdout


def test_without_a_data_set_it_says_so_and_takes_the_small_model(demo_run):
    _, output = demo_run
    assert "training on the DEMO SET" in output
    assert "--download" in output
    assert "Training the small model (--small)." in output


@pytest.mark.skipif((ROOT / "data" / "LJSpeech-1.1").exists(), reason="no demo set where data/LJSpeech-1.1 is there")
@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_ranks_the_first_says_so(tmp_path, rank):
    # a backend that there is not on the CPU: it ends where it would wait for the other rank
    arguments = [f"--coqpit.output_path={tmp_path}", "--coqpit.device=cpu", "--coqpit.distributed_backend=nccl"]
    result = run(TRAIN, *arguments, cwd=tmp_path, RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank)
    assert result.returncode == 1
    assert "distributed_backend='nccl' on cpu" in result.stderr
    said = [text in result.stdout for text in ("training on the DEMO SET", "Training the small model (--small).")]
    assert said == [rank == "0"] * 2


def test_the_mel_loss_falls(demo_run):
    losses = mel_losses(demo_run[1])
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.65 * losses[0]


def test_the_run_folder_holds_checkpoint_config_and_speech(demo_run):
    folder, _ = demo_run
    assert (folder / "checkpoint_60.pth").is_file()
    assert (folder / "best_model.pth").is_file()
    assert json.loads((folder / "config.json").read_text())["hidden_channels"] == 64
    wavs = sorted((folder / "test_audios").glob("60-*.wav"))
    assert [wav.name for wav in wavs] == ["60-0.wav", "60-1.wav"]
    for wav in wavs:
        wave, rate = soundfile.read(wav)
        assert rate == 22050
        assert 0.1 < len(wave) / rate < 60
        assert 0 < np.abs(wave).max() <= 1


def test_tensorboard_holds_what_vits_shows(demo_run):
    events = EventAccumulator(str(demo_run[0]))
    events.Reload()
    tags = events.Tags()
    for name in ("loss_0", "loss_1", "loss_mel", "loss_kl", "loss_dur", "loss_feat", "loss_gen", "grad_norm_1"):
        assert f"TrainIterStats/{name}" in tags["scalars"]
    assert [e.step for e in events.Scalars("TrainIterStats/loss_mel")] == [20, 40, 60]
    assert {"TrainFigures/alignment", "EvalFigures/alignment", "EvalFigures/spoken"} <= set(tags["images"])
    assert {"EvalAudios/spoken", "EvalAudios/recorded", "TestAudios/0"} <= set(tags["audio"])
    assert events.Audio("TestAudios/0")[0].sample_rate == 22050


def test_the_last_lines_say_what_to_do_next(demo_run):
    folder, output = demo_run
    last = output.splitlines()[-4:]
    assert last[0] == f"run folder: {folder}"
    assert last[1] == f"look at it:  {as_a_shell_calls('tensorboard')} --logdir {folder}"
    assert last[2] == f"continue it: {as_a_shell_calls('python')} {TRAIN} --continue_path {folder}"
    assert last[3].startswith(f"let it speak: {as_a_shell_calls('python')} {SPEAK} {folder / 'best_model.pth'}")


def test_it_speaks(demo_run, tmp_path):
    folder, _ = demo_run
    outputs = [tmp_path / "a.wav", tmp_path / "b.wav"]
    for wav in outputs:
        result = run(SPEAK, folder / "best_model.pth", "Good morning.", wav, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    wave, rate = soundfile.read(outputs[0])
    assert rate == 22050
    assert f"{len(wave) / rate:.2f} s" in result.stdout
    # the same seed, the same bytes
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pth", "Hello.", "out.wav"], "none.pth: no such file"),
        (["MODEL", " ", "out.wav"], "text=' ': holds nothing to say"),
    ],
)
def test_speaking_refuses_bad_input(demo_run, tmp_path, arguments, message):
    arguments = [str(demo_run[0] / "best_model.pth") if a == "MODEL" else a for a in arguments]
    result = run(SPEAK, *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_continue(demo_run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(demo_run[0], folder)
    result = run(TRAIN, "--continue_path", folder, "--coqpit.max_steps=62", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "step 60, epoch 5" in result.stdout
    assert (folder / "checkpoint_62.pth").is_file()


def test_small_on_a_folder_and_interrupted(tiny_ljspeech, tmp_path):
    """Ctrl-C leaves a checkpoint and says how to continue."""
    command = [sys.executable, str(TRAIN), "--small", f"--coqpit.dataset_path={tiny_ljspeech}", "--coqpit.print_step=1"]
    command += [f"--coqpit.output_path={tmp_path}", "--coqpit.batch_size=2", "--coqpit.run_eval=false"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    lines = []
    while not lines or not lines[-1].startswith("step 2:"):
        line = process.stdout.readline()
        assert line, process.stderr.read()
        lines.append(line)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    (folder,) = tmp_path.iterdir()
    assert re.search(r"saved .*checkpoint_\d+\.pth", output)
    assert f"--continue_path {folder}" in output
    assert list(folder.glob("checkpoint_*.pth"))
    assert "DEMO SET" not in "".join(lines)


def test_small_on_real_clips(ljspeech_sample, tmp_path):
    arguments = [f"--coqpit.dataset_path={ljspeech_sample}", f"--coqpit.output_path={tmp_path}"]
    result = run(TRAIN, "--small", *arguments, "--coqpit.max_steps=30", *SHORT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    losses = mel_losses(result.stdout)
    assert np.mean(losses[-5:]) < 0.85 * losses[0]
    assert "20 of 20 samples kept" in result.stdout
    (folder,) = tmp_path.iterdir()
    assert (folder / "test_audios" / "30-0.wav").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("data", ["ljspeech_sample", "tiny_ljspeech"])
def test_the_full_size_model_for_two_steps(data, request, tmp_path):
    """The paper's model, 83 million parameters, on real clips and on made-up ones."""
    folder = request.getfixturevalue(data)
    arguments = [f"--coqpit.dataset_path={folder}", f"--coqpit.output_path={tmp_path}", "--coqpit.max_steps=2"]
    arguments += ["--coqpit.batch_size=2", "--coqpit.eval_batch_size=2", "--coqpit.save_checkpoints=false"]
    result = run(TRAIN, *arguments, *SHORT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "83,068,204 parameters" in result.stdout
    losses = mel_losses(result.stdout)
    assert len(losses) == 2
    assert all(np.isfinite(losses))


class TestBadInput:
    """Exit code, message, nothing written."""

    def test_dataset_path_that_is_not_there(self, tmp_path):
        missing = tmp_path / "nowhere"
        result = run(
            TRAIN, f"--coqpit.dataset_path={missing}", f"--coqpit.output_path={tmp_path / 'out'}", cwd=tmp_path
        )
        assert result.returncode == 1
        assert f"error: {missing} is not there" in result.stderr
        assert "metadata.csv" in result.stderr
        assert "Traceback" not in result.stderr
        assert not list(tmp_path.iterdir())

    def test_dataset_path_of_another_layout(self, tmp_path):
        (tmp_path / "data").mkdir()
        result = run(TRAIN, f"--coqpit.dataset_path={tmp_path / 'data'}", cwd=tmp_path)
        assert result.returncode == 1
        assert "lacks the file metadata.csv and the folder wavs" in result.stderr

    def test_a_truncated_wav_is_named(self, tiny_ljspeech, tmp_path):
        folder = tmp_path / "data"
        shutil.copytree(tiny_ljspeech, folder)
        # in the training part whatever the split: cut every clip
        for wav in (folder / "wavs").iterdir():
            wav.write_bytes(wav.read_bytes()[:-2000])
        arguments = [f"--coqpit.dataset_path={folder}", f"--coqpit.output_path={tmp_path / 'out'}", "--small"]
        result = run(TRAIN, *arguments, cwd=tmp_path)
        assert result.returncode == 1
        assert "TINY-0001" in result.stderr
        assert "Traceback" not in result.stderr

    def test_config_that_does_not_go_together(self, tmp_path):
        result = run(TRAIN, "--coqpit.hop_length=100", "--coqpit.n_heads=5", cwd=tmp_path)
        assert result.returncode == 2
        assert "upsample_rates=[8, 8, 2, 2]: their product must be hop_length=100" in result.stderr
        assert "n_heads=5: must divide hidden_channels=192" in result.stderr
