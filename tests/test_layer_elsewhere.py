"""The layer in other projects: torch.func, half precision, meta device, copies, several processes,
optimizers, schedulers, clipped gradients, workers, Lightning, users without a name.
"""

import copy
import pickle
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import distributed, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.parallel import DistributedDataParallel

import dmel
from dmel import DMEL, DifferentiableSpectrogram, parameter_groups


def small_dmel(lambd=7.3, **arguments):
    return DMEL(1000, n_mels=6, hop_length=20, init_lambd=lambd, **arguments)


def small_network(layer=None):
    torch.manual_seed(0)
    return nn.Sequential(layer or small_dmel(), nn.Flatten(), nn.Linear(6 * 16, 4))


@pytest.fixture
def functions():
    """(layer, λ, clips, a loss of λ and one clip, its gradients in both by ordinary autograd)."""
    layer = small_dmel().double()
    lambd = layer.lambd.detach().clone()
    clips = torch.randn(3, 300, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(6, 16, dtype=torch.float64)

    def loss(lambd, clip):
        return (functional_call(layer, {"lambd": lambd}, (clip,)) * upstream).sum()

    in_lambd = []
    in_clips = torch.zeros_like(clips)
    for clip in clips:
        of_lambd, of_clips = torch.autograd.grad(loss(layer.lambd, clip), (layer.lambd, clips))
        in_lambd.append(of_lambd)
        in_clips += of_clips

    dmel.mel_filters.cache_clear()
    return layer, lambd, clips.detach(), loss, torch.stack(in_lambd), in_clips


# Each of these gives the derivative of every clip's loss, in λ or in the clips.


def grad_of_each(lambd, clips, loss):
    return torch.stack([grad(loss)(lambd, clip) for clip in clips])


def grad_per_sample(lambd, clips, loss):
    return vmap(grad(loss), (None, 0))(lambd, clips)


def jacrev_of_all(lambd, clips, loss):
    return jacrev(lambda lambd: vmap(loss, (None, 0))(lambd, clips))(lambd)


def grad_in_clips_per_sample(lambd, clips, loss):
    return vmap(grad(loss, argnums=1), (None, 0))(lambd, clips)


def grad_in_clips_of_vmap(lambd, clips, loss):
    return grad(lambda x: vmap(loss, (None, 0))(lambd, x).sum())(clips)


IN_LAMBD = [grad_of_each, grad_per_sample, jacrev_of_all]
IN_CLIPS = [grad_in_clips_per_sample, grad_in_clips_of_vmap]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", [*IN_LAMBD, *IN_CLIPS])
def test_torch_func_equals_autograd(functions, transform):
    layer, lambd, clips, loss, in_lambd, in_clips = functions
    expected = in_clips if transform in IN_CLIPS else in_lambd
    torch.testing.assert_close(transform(lambd, clips, loss), expected)

    # What the transform left in the cache of filters serves autograd too.
    clips.requires_grad_()
    loss_of_all = sum(loss(layer.lambd, clip) for clip in clips)
    gradients = torch.autograd.grad(loss_of_all, (layer.lambd, clips))
    torch.testing.assert_close(gradients, (in_lambd.sum(), in_clips))

    assert dmel.mel_filters.cache_info().misses == 1


def test_filters_kept_under_nested_transforms_serve_the_next_one(functions):
    _, lambd, clips, loss, in_lambd, _ = functions

    def of_first_clip(clip):
        return grad(loss, argnums=1)(lambd, clip).square().sum()

    grad(of_first_clip)(clips[0])
    assert dmel.mel_filters.cache_info().misses == 1
    torch.testing.assert_close(grad_per_sample(lambd, clips, loss), in_lambd)
    assert dmel.mel_filters.cache_info().misses == 1


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_vmap_over_clips(functions, context):
    layer, _, clips, _, _, _ = functions
    with context():
        features = vmap(layer)(clips)
    torch.testing.assert_close(features.clone(), layer(clips), rtol=1e-12, atol=1e-12)
    assert features.requires_grad == (context is torch.enable_grad)


def test_torch_func_refusals(functions):
    _, lambd, clips, loss, _, _ = functions
    with pytest.raises(RuntimeError, match="no second derivative in lambd"):
        grad(grad(loss))(lambd, clips[0])
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(lambda lambd: loss(lambd, clips[0]), (lambd,), (lambd,))
    with pytest.raises(RuntimeError, match=r"\.item\(\)"):
        vmap(loss, (0, None))(lambd.expand(2), clips[0])


def test_vmap_over_lambda_where_the_fft_size_does_not_follow_it():
    layer = small_dmel(optimized=False).double()
    clips = torch.randn(2, 300, dtype=torch.float64)
    lambds = torch.tensor([7.3, 20.0], dtype=torch.float64)

    def features(lambd):
        return functional_call(layer, {"lambd": lambd}, (clips,))

    expected = torch.stack([features(lambd) for lambd in lambds])
    torch.testing.assert_close(vmap(features)(lambds), expected)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_forward_mode_in_lambda_is_refused_and_right_in_the_clips(context, trained):
    layer = small_dmel().double().requires_grad_(trained)
    clips = torch.randn(2, 300, dtype=torch.float64)
    direction = torch.randn_like(clips)
    with forward_ad.dual_level(), context():
        lambd = forward_ad.make_dual(layer.lambd.detach(), torch.ones_like(layer.lambd))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            functional_call(layer, {"lambd": lambd}, (clips,))
        features = layer(forward_ad.make_dual(clips, direction))
        tangent = forward_ad.unpack_dual(features).tangent
    step = 1e-6 * direction
    expected = (layer(clips + step) - layer(clips - step)) / 2e-6
    torch.testing.assert_close(tangent, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clips_need_it", [False, True])
def test_features_can_be_changed_in_place(clips_need_it):
    """As masks in time and frequency do, and nn.ReLU(inplace=True)."""
    clips = torch.randn(2, 300, requires_grad=clips_need_it)
    kept = torch.ones(2, small_dmel().n_mels, 1)
    kept[:, 2:5] = 0
    gradients = []
    for in_place in (False, True):
        layer = small_dmel()
        features = layer(clips)
        if in_place:
            features[:, 2:5] = 0
            features -= 1
            nn.functional.relu(features, inplace=True)
        else:
            features = nn.functional.relu(features * kept - 1)
        features.sum().backward()
        gradients.append(layer.lambd.grad)
    assert gradients[1] == pytest.approx(gradients[0]) and gradients[0] != 0


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_lambda_is_not_rounded(narrow):
    network = small_network(small_dmel(46.7)).to("cpu", narrow)
    clips = torch.randn(2, 300).to(narrow)
    assert network[0].lambd.dtype == torch.float32
    assert network[0].lambd.item() == torch.tensor(46.7).item()
    features = network[0](clips)
    assert features.dtype == network[2].weight.dtype == narrow
    torch.testing.assert_close(features, network[0](clips.float()).to(narrow), rtol=0, atol=0)
    assert network.double()[0].lambd.dtype == torch.float64
    torch.set_default_dtype(narrow)
    try:
        assert small_dmel(46.7).lambd.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_lambda_trains_in_a_bfloat16_network():
    network = small_network(small_dmel(46.7)).bfloat16()
    clips = torch.randn(4, 300).bfloat16()
    # A step that bfloat16 would lose.
    optimizer = torch.optim.Adam([network[0].lambd], lr=0.01)
    network(clips).float().square().mean().backward()
    optimizer.step()
    assert abs(network[0].lambd.item() - 46.7) == pytest.approx(0.01, rel=0.1)
    assert network[2].weight.grad.abs().sum() > 0


def test_meta_device():
    with torch.device("meta"):
        network = small_network().half()
        other = small_network()
    assert network[0].lambd.is_meta
    assert network[0].lambd.dtype == torch.float32
    assert "lambd=meta" in repr(network)
    assert small_dmel().to("meta", torch.float16).lambd.is_meta

    clips = torch.randn(2, 300)
    fresh = small_network()
    network.to_empty(device="cpu")
    # Whatever the memory held.
    nn.init.constant_(network[0].lambd, 1e3)
    network[0].reset_parameters()
    torch.testing.assert_close(network[0](clips), fresh[0](clips), rtol=0, atol=0)

    other.load_state_dict(fresh.state_dict(), assign=True)
    torch.testing.assert_close(other(clips), fresh(clips), rtol=0, atol=0)


def test_copies_and_pickles():
    layer = small_dmel(norm="slaney")
    nn.init.constant_(layer.lambd, 8.9)
    restored = small_dmel(12.3, norm="slaney")
    assert list(layer.state_dict()) == ["lambd"]
    restored.load_state_dict(layer.state_dict())

    clips = torch.randn(2, 300)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), restored):
        torch.testing.assert_close(other(clips), layer(clips), rtol=0, atol=0)
        assert repr(other) == repr(layer)
        assert other.lambd is not layer.lambd


def test_zero_padded_batch():
    clips = [torch.randn(300) + 1, torch.randn(220) - 2]
    centred = [clip - clip.mean() for clip in clips]
    layer = small_dmel(remove_mean=False)
    features = layer(nn.utils.rnn.pad_sequence(centred, batch_first=True))
    careless = small_dmel()(nn.utils.rnn.pad_sequence(clips, batch_first=True))
    for whole, clip in zip(features, clips, strict=True):
        alone = small_dmel()(clip)
        torch.testing.assert_close(whole[:, : alone.shape[1]], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(careless[1, :, :12], alone, atol=0.1)


def loss_of(network, clips):
    return network(clips).square().mean()


def in_two_processes(rank, folder, recommended):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2
    )
    clips = torch.randn(8, 300, generator=torch.Generator().manual_seed(1))
    halves = clips.chunk(2)
    single = small_network()
    loss_of(single, clips).backward()
    expected = single[0].lambd.grad
    (alone,) = torch.autograd.grad(loss_of(single, halves[rank]), single[0].lambd)
    assert not torch.isclose(alone, expected, rtol=1e-2)

    parallel = DistributedDataParallel(small_network())
    loss_of(parallel, halves[rank]).backward()
    torch.testing.assert_close(parallel.module[0].lambd.grad, expected)

    network = small_network()
    scope = {
        "torch": torch,
        "nn": nn,
        "parameter_groups": parameter_groups,
        "layer": network[0],
        "head": network[1:],
    }
    exec(recommended, scope)
    loss_of(scope["network"], halves[rank]).backward()
    torch.testing.assert_close(network[0].lambd.grad, expected)
    weight = scope["head"][1].weight
    # Half of the head's rows in each process.
    assert weight.to_local().shape[0] == 2
    torch.testing.assert_close(weight.grad.full_tensor(), single[2].weight.grad)
    scope["optimizer"].step()
    # Adam's first step is the learning rate of λ.
    expected_lambd = 7.3 - torch.sign(expected)
    torch.testing.assert_close(network[0].lambd.detach(), expected_lambd, rtol=0, atol=1e-3)

    with pytest.raises(ValueError, match="scalar"):
        scope["fully_shard"](small_network())
    ignoring = small_network()
    scope["fully_shard"](ignoring, ignored_params={ignoring[0].lambd})
    loss_of(ignoring, halves[rank]).backward()
    # Not reduced, so that is left to do.
    torch.testing.assert_close(ignoring[0].lambd.grad, alone)
    distributed.all_reduce(ignoring[0].lambd.grad)
    torch.testing.assert_close(ignoring[0].lambd.grad / 2, expected)
    distributed.destroy_process_group()


def test_two_processes(tmp_path):
    page = (ROOT / "docs" / "layer.md").read_text()
    (recommended,) = re.findall(r"```python\n(# fsdp\n.*?)```", page, re.DOTALL)
    torch.multiprocessing.spawn(in_two_processes, (str(tmp_path), recommended), nprocs=2)


@pytest.mark.filterwarnings("ignore")  # Lightning's
def test_lightning(tmp_path):
    import pytorch_lightning

    class Classifier(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = small_dmel(46.7)
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(96, 4))

        def training_step(self, batch, _):
            self.log("window_ms", 1000 * self.layer.window_length)
            return nn.functional.cross_entropy(self.head(self.layer(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(parameter_groups(self, lr_lambd=0.5), lr=1e-4)

    module = Classifier()
    data = torch.utils.data.TensorDataset(torch.randn(2, 300), torch.arange(2))
    trainer = pytorch_lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    assert abs(module.layer.lambd.item() - 46.7) == pytest.approx(0.5, abs=1e-3)
    # The sample rate is 1 kHz.
    assert trainer.callback_metrics["window_ms"].item() == pytest.approx(6 * 46.7, rel=1e-6)


class Several(nn.Module):
    """A network with two layers, one of them under two names."""

    def __init__(self):
        super().__init__()
        self.first = small_dmel(7.3)
        self.second = DifferentiableSpectrogram(hop_length=20, init_lambd=9.1)
        self.again = self.first
        self.head = nn.Linear(3, 4)


def test_parameter_groups():
    network = Several()
    optimizer = torch.optim.SGD(parameter_groups(network, lr_lambd=0.5), lr=0.1, weight_decay=0.01)
    lambds, others = (group["params"] for group in optimizer.param_groups)
    assert lambds == [network.first.lambd, network.second.lambd]
    assert others == [network.head.weight, network.head.bias]

    before = [parameter.detach().clone() for parameter in network.parameters()]
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    pairs = zip(before, network.parameters(), strict=True)
    steps = [old - parameter.detach() for old, parameter in pairs]
    # λ is without decay, the head is not.
    assert [step.item() for step in steps[:2]] == pytest.approx([0.5, 0.5])
    torch.testing.assert_close(steps[2], 0.1 * (1 + 0.01 * before[2]))

    assert parameter_groups(network)[0]["lr"] == 1.0
    with pytest.raises(ValueError, match="no layer"):
        parameter_groups(nn.Linear(3, 4))


def train(network, optimizer, n_steps=30, scheduler=None):
    """Trains on fixed clips. Returns the samples that λ has moved."""
    clips = torch.randn(16, 300, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(16) % 4
    before = network[0].lambd.item()
    for _ in range(n_steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(clips), labels).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return abs(network[0].lambd.item() - before)


def test_plain_adam_hardly_moves_lambda():
    network = small_network()
    assert train(network, torch.optim.Adam(network.parameters(), lr=1e-4)) < 0.004
    network = small_network()
    assert train(network, torch.optim.Adam(parameter_groups(network), lr=1e-4)) > 1


def test_schedulers():
    """As docs/layer.md recommends, and as it warns."""
    one_cycle = torch.optim.lr_scheduler.OneCycleLR

    def trained_with(scheduler, **arguments):
        network = small_network()
        optimizer = torch.optim.Adam(parameter_groups(network), lr=1e-4)
        if scheduler is one_cycle:
            rates = [group["lr"] for group in optimizer.param_groups]
            arguments = {"max_lr": rates, "total_steps": 31} | arguments
        scheduler = scheduler(optimizer, **arguments)
        rates = [group["lr"] for group in optimizer.param_groups]
        return rates, train(network, optimizer, scheduler=scheduler)

    rates, moved = trained_with(one_cycle)
    assert rates == pytest.approx([1 / 25, 1e-4 / 25])
    assert moved > 1

    rates, moved = trained_with(one_cycle, max_lr=1e-3)
    assert rates == pytest.approx([4e-5, 4e-5])
    assert moved < 0.03  # 30 steps of 1e-3 at most

    for scheduler, arguments in (
        (torch.optim.lr_scheduler.CyclicLR, {"base_lr": [1.0, 1e-4], "max_lr": [2.0, 2e-4]}),
        (torch.optim.lr_scheduler.StepLR, {"step_size": 10}),
        (torch.optim.lr_scheduler.CosineAnnealingLR, {"T_max": 30}),
    ):
        rates, moved = trained_with(scheduler, **arguments)
        assert rates == pytest.approx([1.0, 1e-4])
        assert moved > 1


def test_optimizers_of_other_steps():
    """The first step, in samples, as docs/layer.md warns; λ is 7.3 before."""

    def first_step(optimizer, lr_lambd):
        network = small_network()
        groups = parameter_groups(network, lr_lambd)
        return train(network, optimizer(groups, lr=1e-4), n_steps=1)

    assert first_step(torch.optim.Adam, 1.0) == pytest.approx(1, rel=1e-3)
    assert first_step(torch.optim.RMSprop, 1.0) == pytest.approx(10, rel=1e-3)
    assert first_step(torch.optim.RMSprop, 0.1) == pytest.approx(1, rel=1e-3)
    if hasattr(torch.optim, "Adafactor"):  # from PyTorch 2.5 on
        assert first_step(torch.optim.Adafactor, 1.0) > 7
        assert 0.05 < first_step(torch.optim.Adafactor, 0.01) < 0.1


def test_gradient_clipping():
    """λ's gradient is small beside the head's, so a norm over both is the head's."""
    clips = torch.randn(16, 300, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(16) % 4

    def step(optimizer, clipped):
        """Samples that λ moves in one step, its gradient before clipping, and the norm."""
        network = small_network()
        optimizer = optimizer(parameter_groups(network), lr=1e-4)
        nn.functional.cross_entropy(network(clips), labels).backward()
        gradient = network[0].lambd.grad.item()
        norm = nn.utils.clip_grad_norm_(clipped(network).parameters(), max_norm=1.0).item()
        optimizer.step()
        return 7.3 - network[0].lambd.item(), gradient, norm

    def head(network):
        return network[1:]

    def everything(network):
        return network

    moved, gradient, norm_of_head = step(torch.optim.SGD, head)
    assert abs(gradient) < norm_of_head / 100
    # The step of SGD is lr_lambd = 1 times the gradient.
    assert moved == pytest.approx(gradient, rel=1e-3)

    moved, gradient, norm = step(torch.optim.SGD, everything)
    assert norm == pytest.approx(norm_of_head, rel=1e-3)
    assert norm > 2
    assert moved == pytest.approx(gradient / norm, rel=1e-2)

    # Adam divides by the size of the gradients.
    for clipped in (head, everything):
        moved, _, _ = step(torch.optim.Adam, clipped)
        assert abs(moved) == pytest.approx(1, rel=1e-3)


@pytest.mark.filterwarnings("ignore:init_lambd")
def test_lambda_of_seconds_does_not_move():
    network = small_network(small_dmel(0.035))
    assert train(network, torch.optim.Adam(parameter_groups(network), lr=1e-4), n_steps=3) == 0


def test_a_logarithm_without_a_floor_is_not_finite():
    arguments = {"n_mels": 64, "hop_length": 80, "init_lambd": 8000 * 0.010 / 6}
    layer = DMEL(8000, log=False, **arguments)
    clips = torch.randn(2, 800)
    assert layer(clips).eq(0).any()
    assert not layer(clips).log().isfinite().all()
    assert (layer(clips) + 1e-10).log().isfinite().all()
    assert DMEL(8000, **arguments)(clips).isfinite().all()


class Features(torch.utils.data.Dataset):
    """Features of clips, computed where its items are read."""

    def __init__(self, context):
        self.layer = small_dmel()
        self.clips = torch.randn(2, 300)
        self.context = context

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        with self.context():
            return self.layer(self.clips[index])


def test_workers_of_a_data_loader():
    def first_batch(dataset):
        options = {"multiprocessing_context": "fork", "timeout": 60}
        loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=1, **options)
        return next(iter(loader))

    with pytest.raises(RuntimeError, match=r"stack\(\): functions with out=.*requires grad"):
        first_batch(Features(torch.enable_grad))

    dataset = Features(torch.no_grad)
    features = first_batch(dataset)
    assert not features.requires_grad
    torch.testing.assert_close(features, dataset.layer(dataset.clips).detach())


WITHOUT_A_NAME = """
import getpass
import os
import sys

os.getuid = lambda: 2**31 - 3
try:
    getpass.getuser()
except (KeyError, OSError):
    pass
else:
    sys.exit("this user has a name, so nothing is tested")

import torch
from dmel import DMEL

layer = DMEL(8000, n_mels=8, hop_length=80, init_lambd=40.0)
layer(torch.randn(2, 800)).sum().backward()
print(torch.isfinite(layer.lambd.grad).item(), "torch._dynamo" in sys.modules)
"""


def test_user_without_a_name():
    """PyTorch's compiler cannot be loaded for one, as in many containers, so the layer must not."""
    command = [sys.executable, "-c", WITHOUT_A_NAME]
    result = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True, timeout=120)
    assert result.stdout == "True False\n", result.stderr
