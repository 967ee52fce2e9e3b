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
    {"norm": "slaney", "mel_scale": "slaney", "normalize_window": True, "remove_mean": False},
    {"continuous": True, "zero_floor": True},
    {"log": False},
]
BATCH = torch.export.Dim("batch")
TIME = torch.export.Dim("time", min=HOP)
DIMENSIONS = ({0: BATCH, 1: TIME},)
EXAMPLE = (3, 310)
# None of them is the example's.
SHAPES = [(5, 437), (1, 300), (2, HOP)]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def small_dmel(lambd=7.3, **arguments):
    return DMEL(1000, n_mels=6, hop_length=HOP, init_lambd=lambd, **arguments)


def small_spectrogram():
    return DifferentiableSpectrogram(hop_length=HOP, init_lambd=7.3)


def assert_layers_numbers(features, layer, x):
    """To 1e-5: log-Mels by their difference, powers in relation to the largest."""
    expected = layer(x).detach()
    is_log_mel = isinstance(layer, DMEL) and layer.log
    scale = 1 if is_log_mel else expected.max().item()
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5 * scale)


class Network(nn.Module):
    def __init__(self, layer, head):
        super().__init__()
        self.layer = layer
        self.head = head

    def forward(self, x):
        features = self.layer(x / 2)
        return 2 * self.head(features)


def gradients_of(network, x):
    """The output of a network, and the gradients of its squares' sum in all parameters."""
    outputs = network(x)
    return outputs, torch.autograd.grad(outputs.square().sum(), list(network.parameters()))


# PyTorch gives an nn.Sequential up.
@pytest.mark.parametrize(("network", "n_graphs"), [(Network, 2), (nn.Sequential, 0)])
def test_compiled_network_equals_eager(network, n_graphs):
    layer = small_dmel()
    plain = network(layer, nn.Sequential(nn.Flatten(), nn.Linear(6 * 16, 3)))
    eager = copy.deepcopy(plain)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(plain, backend=backend)
    x = torch.randn(4, 310)
    for lambd, n_fft in ((7.3, 64), (15.0, 128)):
        nn.init.constant_(layer.lambd, lambd)
        nn.init.constant_(next(eager.parameters()), lambd)
        assert layer.n_fft == n_fft
        with torch._dynamo.config.patch(error_on_recompile=n_fft > 64):
            outputs, gradients = gradients_of(compiled, x)
        torch.testing.assert_close((outputs, gradients), gradients_of(eager, x))
        assert gradients[0] != 0
    assert backend.frame_count == n_graphs


def test_compiled_layer_equals_eager():
    layer = small_dmel()
    compiled = torch.compile(layer, backend="aot_eager")
    for shape in ((4, 310), (2, 500)):
        x = torch.randn(shape)
        torch.testing.assert_close(gradients_of(compiled, x), gradients_of(layer, x))


def test_frozen_compiles_into_one_graph():
    layer = small_dmel()
    compiled = torch.compile(layer.frozen(), fullgraph=True, dynamic=True, backend="aot_eager")
    for shape, context in ((EXAMPLE, torch.enable_grad), ((5, 437), torch.no_grad)):
        x = torch.randn(shape)
        with context():
            assert_layers_numbers(compiled(x), layer, x)


@pytest.mark.parametrize("arguments", VARIATIONS)
def test_exported_frozen_layer(arguments):
    layer = small_dmel(**arguments)
    example = (torch.randn(EXAMPLE),)
    exported = torch.export.export(layer.frozen(), example, dynamic_shapes=DIMENSIONS).module()
    for shape in SHAPES:
        x = torch.randn(shape)
        assert_layers_numbers(exported(x), layer, x)


def test_frozen_of_the_clips_length():
    for layer in (small_spectrogram(), small_dmel(optimized=False)):
        with pytest.raises(ValueError, match="n_samples is missing"):
            layer.frozen()
        frozen = layer.frozen(EXAMPLE[1])
        example = torch.randn(EXAMPLE)
        exported = torch.export.export(frozen, (example,), dynamic_shapes=({0: BATCH},)).module()
        traced = torch.jit.trace(frozen, example)
        compiled = torch.compile(frozen, backend="eager")
        x = torch.randn(5, EXAMPLE[1])
        for way in (exported, traced, compiled):
            assert_layers_numbers(way(x), layer, x)


# PyTorch's own warnings.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("layer", "dimensions", "shapes"),
    [
        (small_spectrogram(), ({0: BATCH},), [(1, EXAMPLE[1])]),
        (small_dmel(norm="slaney", normalize_window=True), DIMENSIONS, SHAPES),
        (small_dmel(zero_floor=True), DIMENSIONS, SHAPES),
    ],
)
def test_onnx_of_frozen_layer(layer, dimensions, shapes):
    frozen = layer.frozen(EXAMPLE[1]).eval()
    example = (torch.randn(EXAMPLE),)
    program = torch.onnx.export(
        frozen, example, dynamo=True, dynamic_shapes=dimensions, verbose=False
    )
    model = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for shape in shapes:
        # Silence too: the exporter's optimizer takes a constant 1e-10 for 0.
        for x in (torch.randn(shape), torch.zeros(shape)):
            (features,) = session.run(None, {name: x.numpy()})
            assert_layers_numbers(torch.from_numpy(features), layer, x)


def test_traced_frozen_layer():
    layer = small_dmel()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(layer.frozen(), torch.randn(EXAMPLE))
    for shape in SHAPES:
        x = torch.randn(shape)
        assert_layers_numbers(traced(x), layer, x)


def test_layer_itself_is_not_traced():
    network = nn.Sequential(small_dmel(), nn.Flatten())
    x = torch.randn(EXAMPLE)
    sentence = r"a trace would keep the FFT size of the present λ: trace layer\.frozen\(\)"
    with pytest.raises(RuntimeError, match=sentence):
        torch.jit.trace(network, x)
    with pytest.raises(RuntimeError, match=sentence):
        torch.export.export(network, (x,), strict=False)
    with pytest.raises(torch.onnx.OnnxExporterError) as raised:
        torch.onnx.export(network, (x,), dynamo=True, verbose=False)
    assert "layer.frozen()" in str(raised.value) + str(raised.value.__cause__)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(network, fullgraph=True, backend="eager")(x)


def test_layer_and_frozen_are_not_scripted():
    layer = small_dmel()
    for module in (layer, layer.frozen(), nn.Sequential(layer, nn.Flatten())):
        with pytest.raises(
            RuntimeError, match=r"use torch\.jit\.trace on layer\.frozen\(\) instead"
        ):
            torch.jit.script(module)


@pytest.mark.parametrize("layer", [small_dmel(), small_spectrogram()])
def test_frozen_is_a_module_of_buffers(layer):
    frozen = layer.frozen(300)
    x = torch.randn(4, 300)
    expected = layer(x).detach()
    assert not list(frozen.parameters())
    assert not frozen(x).requires_grad

    # A copy: the layer may train on.
    nn.init.constant_(layer.lambd, 8.1)
    torch.testing.assert_close(frozen(x), expected)
    other = layer.frozen(300)
    assert not torch.allclose(other(x), expected, rtol=1e-2)
    other.load_state_dict(frozen.state_dict())
    torch.testing.assert_close(other(x), expected)

    network = nn.Sequential(copy.deepcopy(frozen)).bfloat16()
    assert {buffer.dtype for buffer in network.buffers()} == {torch.float32}
    narrow = x.bfloat16()
    torch.testing.assert_close(network(narrow), frozen(narrow.float()).bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(frozen.double()(x.double()).float(), expected, rtol=1e-4, atol=1e-5)


def test_state_loaded_into_a_frozen_layer_changes_no_other():
    layer = small_dmel()
    x = torch.randn(4, 300)
    expected = layer.frozen()(x)
    slaney = small_dmel(norm="slaney").frozen()
    layer.frozen().load_state_dict(slaney.state_dict())
    torch.testing.assert_close(layer.frozen()(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("lambd", "n_fft"), [(10.7, 64), (10.9, 128)])
def test_frozen_differs_for_short_clips_alone(lambd, n_fft):
    layer = small_dmel(lambd)
    short = torch.randn(2, n_fft // 4)
    longer = torch.randn(2, n_fft // 4 + 1)
    assert not torch.allclose(layer.frozen()(short), layer(short), atol=0.1)
    assert_layers_numbers(layer.frozen()(longer), layer, longer)


@pytest.mark.parametrize("optimized", [True, False])
def test_frozen_with_a_number_of_samples_is_for_clips_of_that_many(optimized):
    layer = small_dmel(40.0, optimized=optimized)
    x = torch.randn(2, 60)
    assert_layers_numbers(layer.frozen(n_samples=60)(x), layer, x)
    longer = torch.randn(2, 300)
    assert not torch.allclose(layer.frozen(n_samples=60)(longer), layer(longer), atol=0.1)


def test_frozen_refuses_integers_as_the_layer_does():
    layer = small_dmel()
    for module in (layer, layer.frozen()):
        with pytest.raises(ValueError, match=r"floating point of shape .*not torch\.int16"):
            module(torch.ones(2, 300, dtype=torch.int16))
