"""The trained networks of an experiment, to use elsewhere; docs/trained.md has examples.

from trained import load_network

net, config = load_network("ray_results", "audio_mnist")
"""

from config import InputError
from results import Experiment

BEST = "best"  # in place of a trial's key


def load_network(place, name, trial=BEST):
    """A trained network of an experiment, in eval mode on the CPU, and its Config.

    place: folder or URI of results, of main.py or kept by predict_test.py --keep. name: the
    experiment's. trial: a key, or "best": of the finished trials with a trained window that belong
    to the experiment (in kept results: that are there) the one with the highest validation
    accuracy at its best epoch.

    net(clips) takes clips, shape = (batch, config.n_points) float32 at config.resample_rate Hz, and
    gives logits, (batch, n_classes), which models.probabilities understands, and the features,
    (batch, 1, bands, frames). Raises InputError where there is no such network.
    """
    experiment = Experiment(place, name)
    state = read_trained(experiment, trial)
    return network_in(experiment, state), state["config"]


def network_in(experiment, state):
    """The network in what the file of a trial holds, in eval mode on the CPU."""
    config = state["config"]
    net = network_of(config, state["best_net"])
    if net is None:
        raise InputError(
            f"{experiment.address}/trials/{config.key}.pt holds no network of its config: undo "
            "edits of models.py since it was trained, or train it anew."
        )
    return net


def read_trained(experiment, trial=BEST):
    """What the file of a trial holds, see Experiment.read_trial and load_network."""
    keys = experiment.trial_keys()
    if not keys:
        others = ", ".join(with_networks(experiment.storage))
        raise InputError(
            f"no trained network of '{experiment.name}' in {experiment.storage.address}, but of "
            f"{others or 'none'}: name another experiment or folder, or train it with main.py."
        )
    if trial == BEST:
        return read_best(experiment, keys)

    if trial not in keys:
        raise InputError(
            f"no trial '{trial}' in {experiment.address}/trials: name one of the {len(keys)} files "
            "there without its .pt, or best."
        )
    try:
        return experiment.read_trial(trial)
    except ValueError as damage:
        raise InputError(f"{damage}: name another trial.") from None


def with_networks(storage):
    """Names of the experiments in a folder of results that have trained networks."""
    names = []
    for name in storage.list():
        if storage.list(f"{name}/trials"):
            names.append(name)
    return names


def read_best(experiment, keys):
    """What the file of the best trial with a trained window holds; keys: of all that have one."""
    plan = None
    if not experiment.is_without_plan():
        plan = experiment.read_plan()
    configs = {}
    if plan is not None:
        configs = plan.configs()  # their max_epochs are those of now
        keys = [key for key in keys if key in configs]

    best = None
    for key, state in experiment.read_trials(keys):
        config = configs.get(key, state["config"])
        row = state["history"][-1]
        if not config.trainable or not config.is_finished(row):
            continue
        if best is None or rank(row) > rank(best["history"][-1]):
            best = state
    if best is None:
        raise InputError(
            f"no trial with a trained window is finished in {experiment.address}/trials: train "
            f"with main.py --name={experiment.name}, or name another folder or trial."
        )
    return best


def rank(row):
    """What is larger for the better of two trials; row: of the last epoch of one.

    The test split has no say in it.
    """
    return row["best_valid_acc"], -row["best_valid_loss"]


def network_of(config, weights, build=None):
    """The network of a Config with these weights, in eval mode; None where they do not fit it.

    build: gives the network first, as models.build does, which leaves it on the CPU.
    """
    import models  # here, as for --help: torch takes seconds

    # The published weights are not read once more: the trained ones take their place.
    config = config.model_copy(update={"pretrained": False})
    net = (build or models.build)(config)[0]
    try:
        net.load_state_dict(weights)
    except (AttributeError, TypeError, RuntimeError):
        return None
    return net.eval()
