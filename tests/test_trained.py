"""Trained networks elsewhere: load_network, classify.py, and the examples of docs/trained.md."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import librosa
import numpy as np
import onnxruntime
import pytest
import runs
import soundfile
import torch
from conftest import ROOT

import classify
import datasets
import models
import predict_test
import search_spaces
from config import InputError, parse, plain
from results import Experiment
from trained import load_network

DATA = Path(__file__).parent / "data"
PULSES = {**plain(search_spaces.time_frequency(1)), "n_samples": 50, "init_lambd": 6.38}
DIGITS = {**plain(search_spaces.audio_mnist(1)), "init_lambd": 46.7, "trainable": True}
CLIP = DATA / "AudioMNIST" / "data" / "26" / "3_26_0.wav"  # 8 kHz, mono, 16 bit


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DMEL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return datasets.recordings_of(parse(DIGITS), DATA / "AudioMNIST")


@pytest.fixture(scope="module")
def results(tmp_path_factory, recordings):
    """A folder with the experiments audio_mnist, of one trial on spoken digits, and pulses."""
    folder = tmp_path_factory.mktemp("project") / "ray_results"
    runs.write_trained(folder, "audio_mnist", [parse(DIGITS)], recordings)
    runs.write_trained(folder, "pulses", [parse({**PULSES, "trainable": True})])
    return folder


def assert_is(net, state):
    weights = net.state_dict()
    assert weights.keys() == state["best_net"].keys()
    for name, value in state["best_net"].items():
        assert torch.equal(weights[name], value), name
    assert not any(module.training for module in net.modules())


# Loading


@pytest.fixture(scope="module")
def states():
    """What trials of several seeds leave, trained once."""
    found = {}
    for trainable in (True, False):
        for seed in (0, 1, 2):
            config = parse({**PULSES, "trainable": trainable, "seed": seed})
            found[config] = runs.trained(config)
    return found


@pytest.fixture
def experiment(tmp_path, states):
    """Trials with a validation accuracy that grows with the seed, baselines being better."""
    experiment = runs.write_trained(tmp_path, "pulses", [])
    plan = experiment.read_plan()
    for config, state in states.items():
        accuracy = 0.1 * config.seed + (0.0 if config.trainable else 0.5)
        runs.write_trial(experiment, config, state, best_valid_acc=accuracy)
        plan.trials[config.key] = config.model_dump()
    experiment.write_plan(plan)
    return experiment


def key_of(**changes):
    return parse({**PULSES, "trainable": True, **changes}).key


def best(experiment):
    net, config = load_network(experiment.storage.root, "pulses")
    assert_is(net, experiment.read_trial(config.key))
    return config.key


def test_best_is_the_highest_validation_accuracy_of_the_trained_that_belong(experiment):
    assert best(experiment) == key_of(seed=2)

    plan = experiment.read_plan()
    del plan.trials[key_of(seed=2)]  # it lies aside
    experiment.write_plan(plan)
    assert best(experiment) == key_of(seed=1)

    plan.trials[key_of(seed=1)]["max_epochs"] = 2  # it is not finished any more
    experiment.write_plan(plan)
    assert best(experiment) == key_of(seed=0)


def test_of_equal_accuracies_the_lower_loss_is_better(experiment, states):
    for config, state in states.items():
        loss = 1.0 if config.seed == 1 else 2.0
        runs.write_trial(experiment, config, state, best_valid_acc=0.5, best_valid_loss=loss)
    assert best(experiment) == key_of(seed=1)


def test_a_trial_is_named_by_its_key(experiment):
    key = key_of(trainable=False, seed=1)
    net, config = load_network(experiment.storage.root, "pulses", trial=key)
    assert config.key == key and not config.trainable
    assert_is(net, experiment.read_trial(key))


RECORDS = {
    "reduced": '{"version": 2, "seeds": [0], "n_trials": 6, "max_epochs": 1, "starts": []}',
    "version 1": '{"search_space": {}, "data": null, "batches": [{"n_trials": 6}]}',
    "none": None,
}


@pytest.mark.parametrize("record", RECORDS)
def test_kept_networks_are_those_that_are_there(experiment, record):
    path = Path(experiment.storage.root, "pulses", "experiment.json")
    path.unlink()
    if RECORDS[record] is not None:
        path.write_text(RECORDS[record])
    assert best(experiment) == key_of(seed=2)
    (path.parent / "trials" / f"{key_of(seed=2)}.pt").unlink()
    assert best(experiment) == key_of(seed=1)


def damage_plan(folder):
    (folder / "experiment.json").write_text("{")


def damage_weights(folder):
    path = folder / "trials" / f"{key_of(seed=2)}.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"best_net": {"head.1.weight": torch.zeros(2)}}, path)


def remove_trained(folder):
    for seed in (0, 1, 2):
        (folder / "trials" / f"{key_of(seed=seed)}.pt").unlink()


def damage_trial(folder):
    (folder / "trials" / f"{key_of(seed=1)}.pt").write_bytes(b"no archive")


REFUSED = {
    "no experiment": (shutil.rmtree, {}, r"no trained network of 'pulses' in \S+, but of none: "),
    "no trial": (
        lambda folder: shutil.rmtree(folder / "trials"),
        {},
        r"no trained network of 'pulses' in \S+, but of none: ",
    ),
    "none trained": (remove_trained, {}, r"no trial with a trained window is finished"),
    "damaged plan": (damage_plan, {}, r"experiment\.json is damaged"),
    "another key": (lambda folder: None, {"trial": "../x"}, r"no trial '\.\./x' in .* the 6 files"),
    "other weights": (damage_weights, {}, r"trials/\w+\.pt holds no network of its config"),
    "damaged trial": (damage_trial, {"trial": key_of(seed=1)}, r"\w+\.pt is damaged .*another"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_one_sentence(experiment, case):
    damage, arguments, message = REFUSED[case]
    damage(Path(experiment.storage.root, "pulses"))
    with pytest.raises(InputError, match=message) as error:
        load_network(experiment.storage.root, "pulses", **arguments)
    assert "\n" not in str(error.value)


def test_a_network_gives_what_was_predicted(results, recordings):
    net, config = load_network(results, "audio_mnist")
    state = Experiment(results, "audio_mnist").read_trial(config.key)
    classes = datasets.class_names(config, "nowhere")
    rows = predict_test.predict(config, state["best_net"], recordings, classes)
    clips = torch.from_numpy(recordings.clips)[datasets.split_clips(config, recordings)["test"]]
    with torch.no_grad():
        probabilities, predicted = models.probabilities(config, net(clips)[0]).max(dim=1)
    assert [int(guess) for _, _, guess, _ in rows] == predicted.tolist()
    told = [float(probability) for *_, probability in rows]
    assert told == pytest.approx(probabilities.tolist(), rel=1e-3)


# classify.py


@pytest.fixture
def classified(monkeypatch, capsys, results):
    """Runs classify.py, on audio_mnist unless flags say otherwise.

    Returns its lines, what it says on stderr, and its exit code.
    """

    def run(*arguments):
        command = ["classify.py", f"--results={results}", "--experiment=audio_mnist"]
        monkeypatch.setattr(sys, "argv", [*command, *map(str, arguments)])
        code = 0
        try:
            classify.main()
        except SystemExit as end:
            code = end.code
        output = capsys.readouterr()
        return output.out.splitlines(), output.err, code

    return run


def expected_classes(results, path):
    """(probability, class) as the lines tell them, by librosa and by hand, likeliest first."""
    net, _ = load_network(results, "audio_mnist")
    samples, _ = librosa.load(path, sr=8000, mono=True)
    n_before = 1 + (8000 - len(samples)) // 2 if len(samples) <= 8000 else 0
    clip = np.zeros(8000, np.float32)
    part = samples[: 8000 - n_before]
    clip[n_before : n_before + len(part)] = part
    with torch.no_grad():
        probabilities = net(torch.from_numpy(clip)[None])[0].softmax(dim=1)[0]
    order = probabilities.argsort(descending=True).tolist()
    return [(probabilities[label].item(), str(label)) for label in order]


def classes_of(lines):
    return [(float(probability), name) for probability, name in map(str.split, lines)]


def assert_classes(lines, expected):
    found = classes_of(lines)
    assert [name for _, name in found] == [name for _, name in expected]
    values = [probability for probability, _ in expected]
    assert [value for value, _ in found] == pytest.approx(values, abs=1e-4)


def test_recordings_of_any_kind_are_classified_as_trained_on(classified, results, tmp_path):
    samples, rate = soundfile.read(CLIP)
    assert rate == 8000
    flac = tmp_path / "digit.flac"
    soundfile.write(flac, samples, rate, subtype="PCM_16")

    quick = librosa.resample(samples, orig_sr=8000, target_sr=44100)
    stereo = tmp_path / "stereo.wav"
    soundfile.write(stereo, np.stack([1.5 * quick, 0.2 * quick], axis=1), 44100, subtype="FLOAT")
    long = tmp_path / "long.ogg"
    soundfile.write(long, np.tile(samples, 5), rate)

    paths = [CLIP, flac, stereo, long]
    (title, *lines), errors, code = classified("--top=10", *paths)
    net, config = load_network(results, "audio_mnist")
    window = 1000 * net.spectrogram_layer.window_length
    assert title == f"audio_mnist, trial {config.key}: window of {window:.1f} ms"
    assert (errors, code, len(lines)) == ("", 0, 4 * 11)
    for number, path in enumerate(paths):
        name, *of_file = lines[11 * number : 11 * (number + 1)]
        assert name == str(path)
        assert_classes(of_file, expected_classes(results, path))
    assert lines[1:11] == lines[12:22]  # FLAC is the same samples


def test_five_classes_are_printed_unless_others_are_asked_for(classified):
    assert len(classified(CLIP)[0]) == 2 + 5
    assert len(classified(CLIP, "--top=2")[0]) == 2 + 2
    assert len(classified(CLIP, "--top=99")[0]) == 2 + 10
    with pytest.raises(InputError, match=r"--top=0 must be 1 or more"):
        classified(CLIP, "--top=0")


def test_files_that_cannot_be_used_are_named_and_the_others_classified(classified, tmp_path):
    cut = tmp_path / "cut.wav"
    cut.write_bytes(CLIP.read_bytes()[:-100])
    text = tmp_path / "text.wav"
    text.write_text("no sound")
    missing = tmp_path / "missing.wav"
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(9000), 8000)
    lines, errors, code = classified("--top=1", cut, missing, CLIP, text, tmp_path, silent, CLIP)
    assert code == 1
    assert [line for line in lines if line == str(CLIP)] == [str(CLIP)] * 2 and len(lines) == 5
    assert errors.splitlines() == [
        f"classify.py: {cut}: it is a WAV that is cut off: left out",
        f"classify.py: {missing}: there is no such file: left out",
        f"classify.py: {text}: libsndfile cannot read it: left out",
        f"classify.py: {tmp_path}: it is not a regular file: left out",
        f"classify.py: {silent}: it is silent: left out",
    ]


def test_drawn_data_have_no_recordings(classified):
    with pytest.raises(InputError, match=r"pulses is trained on pulses that are drawn, and"):
        classified("--experiment=pulses", CLIP)


def test_kept_networks_classify_with_the_names_of_their_classes(
    classified, monkeypatch, tmp_path, results, capsys
):
    """From what --keep copies, without anything else."""
    data = tmp_path / "data" / "audio_mnist"
    shutil.copytree(DATA / "AudioMNIST", data)
    (data / "LICENSE").write_text("as you like")
    names = [f"digit{label}" for label in range(10)]
    monkeypatch.setattr(datasets, "class_names", lambda *_: names)
    flags = ["--dataset_name=audio_mnist", f"--ray_results_dir={results}"]
    flags += [f"--data_base_dir={data.parent}", f"--keep={tmp_path / 'kept'}"]
    monkeypatch.setattr(sys, "argv", ["predict_test.py", *flags])
    predict_test.main()
    capsys.readouterr()

    monkeypatch.setattr(datasets, "class_names", None)
    lines, _, code = classified(f"--results={tmp_path / 'kept'}", CLIP, "--top=10")
    assert lines[0].startswith("audio_mnist, trial ") and code == 0
    expected = [(share, f"digit{label}") for share, label in expected_classes(results, CLIP)]
    assert_classes(lines[2:], expected)
    net, _ = load_network(tmp_path / "kept", "audio_mnist")
    key = parse(DIGITS).key
    assert_is(net, Experiment(results, "audio_mnist").read_trial(key))


# Pages


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_page_examples(results, recordings, monkeypatch, tmp_path, capsys):
    """The network of the page, loaded and as ONNX, run without torch."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(results, tmp_path / "ray_results")
    scope = {}
    page = (ROOT / "docs" / "trained.md").read_text()
    for example in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(example, scope)
    window = 1000 * scope["net"].spectrogram_layer.window_length
    assert capsys.readouterr().out.startswith(f"{window} ms\n")

    session = onnxruntime.InferenceSession(tmp_path / "audio_mnist.onnx")
    (given,) = session.get_inputs()
    for n_clips in (1, 5):
        clips = recordings.clips[:n_clips]
        logits, features = session.run(None, {given.name: clips})
        with torch.no_grad():
            expected_logits, expected = scope["net"](torch.from_numpy(clips))
        np.testing.assert_allclose(features, expected.numpy(), rtol=0, atol=1e-3)
        np.testing.assert_allclose(logits, expected_logits.numpy(), rtol=0, atol=1e-3)


def test_scripts_say_what_they_do_without_torch():
    code = "import sys, classify, predict_test, trained; print({'torch', 'ray'} & {*sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


def test_a_fresh_clone_classifies_digits():
    """By the network in results/, of the speaker who is in no other part than the test split."""
    net, config = load_network(ROOT / "results", "audio_mnist")
    n_right = 0
    for digit in range(10):
        clip = classify.read_clip(CLIP.with_name(f"{digit}_26_0.wav"), config)
        logits, _ = net(torch.from_numpy(clip)[None])
        n_right += logits.argmax().item() == digit
    assert n_right >= 7  # 8 where it was trained
