"""The layer under torch.compile, and frozen: torch.export, ONNX, torch.jit.trace."""

import copy
import warnings

import onnxruntime
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from dmel import DMEL, DifferentiableSpectrogram

HOP = 20
VARIATIONS = [
    {},
    {"norm": "slaney", "mel_scale": "slaney"},
    {"continuous": True},
    {"normalize_window": True},
    {"remove_mean": False},
    {"zero_floor": True},
    {"log": False},
]
DIMENSIONS = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("time", min=HOP)},)
SHAPES = [(5, 437), (1, 300), (2, HOP), (3, 2000)]  # none of them EXAMPLE's
EXAMPLE = (3, 310)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def small_dmel(lambd=7.3, **arguments):
    return DMEL(1000, n_mels=6, hop_length=HOP, init_lambd=lambd, **arguments)


def assert_layers_numbers(features, layer, x):
    """To 1e-5: log-Mels by their difference, powers in relation to the largest."""
    expected = layer(x).detach()
    scale = 1 if getattr(layer, "log", False) else expected.max().item()
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5 * scale)


class Network(nn.Module):
    def __init__(self, layer, head):
        super().__init__()
        self.layer, self.head = layer, head

    def forward(self, x):
        features = self.layer(x / 2)
        return 2 * self.head(features)


WAYS = {  # what is compiled, and the number of graphs
    "network": (lambda layer, head, backend: torch.compile(Network(layer, head), backend=backend), 2),
    "head": (lambda layer, head, backend: nn.Sequential(layer, torch.compile(head, backend=backend)), 1),
    "sequential": (lambda layer, head, backend: torch.compile(nn.Sequential(layer, head), backend=backend), 0),
}


@pytest.mark.parametrize("way", WAYS)
def test_compiled_network_equals_eager(way):
    backend = CompileCounterWithBackend("aot_eager")
    layer, head = small_dmel(), nn.Sequential(nn.Flatten(), nn.Linear(6 * 16, 3))
    plain = (Network if way == "network" else nn.Sequential)(layer, head)
    eager = copy.deepcopy(plain)
    compile_it, n_graphs = WAYS[way]
    compiled, x = compile_it(layer, head, backend), torch.randn(4, 310)
    for lambd, n_fft in ((7.3, 64), (15.0, 128)):
        with torch.no_grad():
            layer.lambd.fill_(lambd)
            next(eager.parameters()).fill_(lambd)
        assert layer.n_fft == n_fft
        with torch._dynamo.config.patch(error_on_recompile=n_fft > 64):
            outputs = compiled(x)
        torch.testing.assert_close(outputs, eager(x))
        gradients = torch.autograd.grad(outputs.square().sum(), list(plain.parameters()))
        torch.testing.assert_close(gradients, torch.autograd.grad(eager(x).square().sum(), list(eager.parameters())))
        assert gradients[0] != 0
    assert backend.frame_count == n_graphs


def test_compiled_network_breaks_at_the_layer_alone():
    network = Network(small_dmel(), nn.Sequential(nn.Flatten(), nn.Linear(6 * 16, 3)))
    found = torch._dynamo.explain(network)(torch.randn(4, 310))
    assert (found.graph_break_count, found.graph_count) == (1, 2)
    assert found.break_reasons[0].user_stack[-1].line == "features = self.layer(x / 2)"


def test_frozen_compiles_into_one_graph():
    layer, backend = small_dmel(), "aot_eager"
    compiled = torch.compile(layer.frozen(), fullgraph=True, dynamic=True, backend=backend)
    for shape in (EXAMPLE, (5, 437)):
        x = torch.randn(shape)
        assert_layers_numbers(compiled(x), layer, x)
    spectrogram, x = DifferentiableSpectrogram(hop_length=HOP, init_lambd=7.3), torch.randn(EXAMPLE)
    compiled = torch.compile(spectrogram.frozen(EXAMPLE[1]), fullgraph=True, backend="aot_eager")
    assert_layers_numbers(compiled(x), spectrogram, x)


@pytest.mark.parametrize("arguments", VARIATIONS)
def test_exported_frozen_layer(arguments):
    layer = small_dmel(**arguments)
    exported = torch.export.export(layer.frozen(), (torch.randn(EXAMPLE),), dynamic_shapes=DIMENSIONS).module()
    for shape in SHAPES:
        x = torch.randn(shape)
        assert_layers_numbers(exported(x), layer, x)


@pytest.mark.parametrize(
    "layer", [DifferentiableSpectrogram(hop_length=HOP, init_lambd=7.3), small_dmel(optimized=False)]
)
def test_exported_frozen_layer_of_the_clips_length(layer):
    frozen = layer.frozen(EXAMPLE[1])
    exported = torch.export.export(frozen, (torch.randn(EXAMPLE),), dynamic_shapes=({0: DIMENSIONS[0][0]},)).module()
    for n_clips in (1, 5):
        x = torch.randn(n_clips, EXAMPLE[1])
        assert_layers_numbers(exported(x), layer, x)
    with pytest.raises(ValueError, match="n_samples is missing"):
        layer.frozen()


@pytest.mark.parametrize(
    ("layer", "n_samples", "dimensions", "shapes"),
    [
        (small_dmel(), None, DIMENSIONS, SHAPES),
        (small_dmel(norm="slaney", mel_scale="slaney", normalize_window=True), None, DIMENSIONS, SHAPES),
        (
            DifferentiableSpectrogram(hop_length=HOP, init_lambd=7.3),
            256,
            ({0: DIMENSIONS[0][0]},),
            [(1, 256), (5, 256)],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # PyTorch's own
def test_onnx_of_frozen_layer(layer, n_samples, dimensions, shapes):
    frozen, example = layer.frozen(n_samples).eval(), torch.randn(3, n_samples or EXAMPLE[1])
    program = torch.onnx.export(frozen, (example,), dynamo=True, dynamic_shapes=dimensions, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for shape in shapes:
        # Silence: exporters take 1e-10 for 0, and its logarithm would be that of 0.
        for x in (torch.randn(shape), torch.zeros(shape)):  # silence: the optimizer takes a constant 1e-10 for 0
            (features,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            assert_layers_numbers(torch.from_numpy(features), layer, x)


def test_traced_frozen_layer():
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        layer = small_dmel()
        traced = torch.jit.trace(layer.frozen(), torch.randn(EXAMPLE))
        spectrogram = DifferentiableSpectrogram(hop_length=HOP, init_lambd=7.3)
        traced_spectrogram = torch.jit.trace(spectrogram.frozen(EXAMPLE[1]), torch.randn(EXAMPLE))
    for shape in SHAPES:
        x = torch.randn(shape)
        assert_layers_numbers(traced(x), layer, x)
    x = torch.randn(5, EXAMPLE[1])
    assert_layers_numbers(traced_spectrogram(x), spectrogram, x)


def test_frozen_layer_without_gradients():
    layer, example = small_dmel(), torch.randn(EXAMPLE)
    with torch.no_grad():
        exported = torch.export.export(layer.frozen(), (example,), dynamic_shapes=DIMENSIONS).module()
        traced = torch.jit.trace(layer.frozen(), example)
        compiled = torch.compile(layer.frozen(), fullgraph=True, dynamic=True, backend="aot_eager")
        for shape in (EXAMPLE, (5, 437)):
            x = torch.randn(shape)
            kept = x.clone()
            for frozen in (exported, traced, compiled, layer.frozen()):
                assert_layers_numbers(frozen(x), layer, x)
                assert torch.equal(x, kept)


@pytest.mark.parametrize("network", [small_dmel(), nn.Sequential(small_dmel(), nn.Flatten())])
def test_layer_itself_is_not_traced(network):
    x, sentence = (
        torch.randn(EXAMPLE),
        r"a trace would keep the FFT size of the present λ: trace layer\.frozen\(\) instead",
    )
    with pytest.raises(RuntimeError, match=sentence):
        torch.jit.trace(network, x)
    with pytest.raises(RuntimeError, match=sentence):
        torch.export.export(network, (x,), strict=False)
    with pytest.raises(torch.onnx.OnnxExporterError) as raised:
        torch.onnx.export(network, (x,), dynamo=True, verbose=False)
    assert "layer.frozen()" in str(raised.value) + str(raised.value.__cause__)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(network, fullgraph=True, backend="eager")(x)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.export.export(network, (x,), strict=True)


@pytest.mark.parametrize("layer", [small_dmel(), DifferentiableSpectrogram(hop_length=HOP, init_lambd=7.3)])
def test_frozen_is_a_module_of_buffers(layer):
    frozen, x = layer.frozen(300), torch.randn(4, 300)
    expected = layer(x).detach()
    assert not list(frozen.parameters()) and not frozen(x).requires_grad
    with torch.no_grad():
        layer.lambd.fill_(8.1)
    other = layer.frozen(300)
    assert not torch.allclose(other(x), expected, rtol=1e-2)
    torch.testing.assert_close(frozen(x), expected)  # a copy: the layer may train on
    other.load_state_dict(frozen.state_dict())
    torch.testing.assert_close(other(x), expected)
    for narrow in (torch.float16, torch.bfloat16):
        network = nn.Sequential(copy.deepcopy(frozen)).to(narrow)
        assert {buffer.dtype for buffer in network.buffers()} == {torch.float32}
        features = network(x.to(narrow))
        assert features.dtype == narrow
        torch.testing.assert_close(features, frozen(x.to(narrow).float()).to(narrow), rtol=0, atol=0)
    torch.testing.assert_close(frozen.double()(x.double()).float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("lambd", "n_fft"), [(7.3, 64), (10.7, 64), (10.9, 128), (46.7, 512)])
def test_frozen_differs_for_short_clips_alone(lambd, n_fft):
    layer = small_dmel(lambd)
    assert layer.n_fft == n_fft
    short, longer = torch.randn(2, n_fft // 4), torch.randn(2, n_fft // 4 + 1)
    assert not torch.allclose(layer.frozen()(short), layer(short), atol=0.1)
    assert_layers_numbers(layer.frozen()(longer), layer, longer)
