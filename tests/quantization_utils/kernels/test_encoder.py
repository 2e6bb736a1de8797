"""The fused encoder against the modules it stands for."""

import gc
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import models
from quantization_utils import absmean, int8_absmax, pack_, quantize_
from quantization_utils.kernels import available_backends, cpu, reference
from quantization_utils.packed_encoder import linear_layers
from tests.networks import assert_equal_but_for_rounding, packed_vit

BACKENDS = [name for name in available_backends() if name.startswith("cpu-")]


def use(model: nn.Module, backend: str) -> None:
    for layer in model.network.vit.layers:
        for linear in linear_layers(layer):
            linear.backend, linear._runner = backend, None
    model.encoder.reset()


def written(options: dict[str, object]) -> str:
    """For a test's name: the same in every process."""
    return ",".join(f"{name}={getattr(value, '__name__', value)}" for name, value in options.items()) or "default"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"patch_size": 8, "width": 192, "depth": 1}, {"patch_size": 16}, {"quantizer": int8_absmax}, {"act_bits": 4}],
    ids=written,
)
@torch.no_grad()
def test_equals_the_modules(backend: str, options: dict[str, object]) -> None:
    """17 tokens, 5 and 65: fewer than a vector's lanes, and not a multiple of the rows of a tile."""
    model = packed_vit(**options)
    hidden = torch.randn(3, (32 // int(options.get("patch_size", 4))) ** 2 + 1, int(options.get("width", 128)))
    use(model, "reference")
    tokens = hidden.shape[1]
    wanted = model.encoder(hidden, tokens)
    assert model.encoder.backend is None
    use(model, backend)
    found = model.encoder(hidden, tokens)
    assert_equal_but_for_rounding(found, wanted)
    assert model.encoder.backend == backend
    for threads in (1, 2, 3):  # 3 images: each thread has one, or all share the rows of each
        torch.set_num_threads(threads)
        for kept in (tokens, 3, 1, 0):  # whatever the batch, the threads and what is used later
            assert torch.equal(model.encoder(hidden, kept), found[:, :kept])
            assert torch.equal(model.encoder(hidden[1:2], kept), found[1:2, :kept])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"patch_size": 8, "width": 192, "depth": 1}, {"quantizer": int8_absmax}, {"act_bits": 4}],
    ids=written,
)
@torch.no_grad()
def test_from_images_to_logits(backend: str, options: dict[str, object]) -> None:
    """Embedded by the operator as PyTorch does it, bit for bit; whatever the batch and the threads."""
    model, images = packed_vit(**options), torch.rand(5, 3, 32, 32)
    use(model, backend)
    network, pixels = model.network, model.normalize(images)
    model(images)
    operator = model.encoder._runner
    assert operator.embeds and operator.classes == 10
    tokens = (32 // int(options.get("patch_size", 4))) ** 2 + 1
    assert torch.equal(operator(images, tokens), operator(network.vit.embeddings(pixels), tokens))
    class_token = operator(network.vit.embeddings(pixels), 1)[:, 0]
    found = model(images)
    assert_equal_but_for_rounding(found, network.classifier(network.vit.layernorm(class_token)))
    assert_equal_but_for_rounding(found, network(pixels).logits)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for batch in (1, 2, 3, 5):
            assert torch.equal(model(images[:batch]), found[:batch])
    images[1, 0, 3, 3] = float("nan")
    assert model(images)[1].isnan().all() and torch.equal(model(images)[2:], found[2:])


@torch.no_grad()
def test_images_one_after_the_other_are_each_their_own() -> None:
    """Threads that share an image keep what they make of it for that call only."""
    model, images = packed_vit(), torch.rand(2, 3, 32, 32)
    expected = model(images)
    torch.set_num_threads(2)
    assert all(torch.equal(model(images[i : i + 1]), expected[i : i + 1]) for i in (0, 1, 0))


@pytest.mark.parametrize("kept", ["*.projection", "*.classifier", ("*.projection", "*.classifier")], ids=str)
@torch.no_grad()
def test_what_is_not_packed_runs_in_pytorch(kept: str | tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = models.build("vit", 10, width=128, depth=2).eval()
    pack_(quantize_(model, absmean, 8, keep=kept))
    images = torch.rand(3, 3, 32, 32)
    found = model(images)
    assert_equal_but_for_rounding(found, model.network(model.normalize(images)).logits)
    operator = model.encoder._runner
    assert operator.embeds == ("*.projection" not in kept) and bool(operator.classes) == ("*.classifier" not in kept)


@torch.no_grad()
def test_images_of_another_size_are_resized_first() -> None:
    model, images = packed_vit(), torch.rand(2, 3, 48, 40)
    resized = nn.functional.interpolate(images, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(model(images), model(resized))


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_any_number_of_tokens(backend: str) -> None:
    """Attention by whole vectors, with a padded one, and with dot products for the tokens that begin one."""
    model = packed_vit(width=64, depth=1)
    for tokens in (1, 2, 3, 4, 8, 10, 16, 18, 20, 31, 50, 100):
        hidden = torch.randn(2, tokens, 64)
        use(model, "reference")
        wanted = model.encoder(hidden, tokens)
        use(model, backend)
        assert_equal_but_for_rounding(model.encoder(hidden, tokens), wanted)


def test_the_pieces_of_gelu() -> None:
    """The table as it stands in the source, in double precision, against PyTorch's."""
    source = (Path(cpu.__file__).parent / "cpu" / "body_functions.h").read_text()
    numbers = re.findall(r"(-?\d\.\d+e-\d+)f", source.split("kGelu[6][16] = {")[1].split("};")[0])
    pieces = torch.tensor([float(n) for n in numbers], dtype=torch.float64).view(6, 16)
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    magnitude = x.abs().clamp_max(5.4966)
    position = magnitude * 16 / 5.5 - 0.5
    part, y = position - position.round(), torch.zeros_like(x)
    for coefficients in pieces:
        y = y * part + coefficients[position.round().long()]
    error = ((x.clamp_min(0) + magnitude * y) - nn.functional.gelu(x)).abs()
    assert error.max() < 1.1e-7 and error[x.abs() < 4].max() < 1e-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_of_the_kernels(backend: str) -> None:
    """An encoder that adds GELU(its bias) in 8 bits: what is added is the nearest of their steps."""

    def dense(codes: torch.Tensor, bias: torch.Tensor | None = None) -> cpu.Dense:
        return codes.to(torch.int8), torch.ones(len(codes)), bias

    def zeros(n: int) -> torch.Tensor:
        return torch.zeros(n, 64)

    norms = [torch.ones(64), torch.zeros(64)] * 2
    for inputs in torch.cat([torch.linspace(-6, 0, 512), torch.linspace(0, 6, 256)]).split(64):
        qkv, out, fc1, fc2 = dense(zeros(192)), dense(zeros(64)), dense(zeros(64), inputs), dense(torch.eye(64))
        layer = cpu.EncoderLayer(qkv, out, fc1, fc2, norms)
        added = cpu.Encoder([layer], 1, 1e-6, 8, backend)(torch.zeros(1, 2, 64), 2)
        wanted = nn.functional.gelu(inputs)
        assert (added - wanted).abs().max() < 0.505 * wanted.abs().max() / 127 + 5e-7


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_codes_after_attention_are_those_of_pytorchs(backend: str) -> None:
    """A layer that adds attention's quantized output alone: less than a code in 10,000 is another."""
    torch.manual_seed(0)
    width, heads, eye = 128, 2, torch.eye(128, dtype=torch.int8)
    codes = torch.randint(-1, 2, (3 * width, width), dtype=torch.int8)
    qkv = (codes, torch.rand(3 * width) / 8, torch.randn(3 * width))
    nothing = torch.zeros(width, width, dtype=torch.int8), torch.ones(width), None
    norms = [torch.rand(width) + 0.5, torch.randn(width), torch.ones(width), torch.zeros(width)]
    layer = cpu.EncoderLayer(qkv, (eye, torch.ones(width), None), nothing, nothing, norms)
    hidden = torch.randn(16, 65, width)
    added = cpu.Encoder([layer], heads, 1e-6, 8, backend)(hidden, 65) - hidden

    normal = nn.functional.layer_norm(hidden, (width,), norms[0], norms[1], 1e-6)
    parts = reference.Linear(*qkv, 8)(normal).view(16, 65, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    attended = nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
    codes, scale = reference.quantize_dynamic(attended, 8, "token")
    wrong = (added / scale).round() - codes
    assert wrong.abs().max() <= 1 and wrong.ne(0).double().mean() < 1e-4 and codes.unique().numel() > 200


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_large_scores_and_constant_tokens(backend: str) -> None:
    """Softmax with one winner; a LayerNorm without variance."""
    model = packed_vit()
    hidden = 1000 * torch.randn(2, 65, 128)
    hidden[0, 3] = 5.0
    for layer in model.network.vit.layers:
        layer.attention.q_proj.scale *= 1000
    use(model, "reference")
    wanted = model.encoder(hidden, 65)
    use(model, backend)
    found = model.encoder(hidden, 65)
    assert found.isfinite().all()
    assert_equal_but_for_rounding(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_scores_that_are_no_numbers_stay_so(backend: str) -> None:
    """Of infinite ones of either sign softmax makes none, though queries, keys and values are finite."""
    model, hidden = packed_vit(), torch.randn(2, 17, 128)
    for layer in model.network.vit.layers:
        layer.attention.q_proj.scale *= 1e30
        layer.attention.k_proj.scale *= 1e30
    use(model, backend)
    assert model.encoder(hidden, 17).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@torch.no_grad()
def test_what_is_not_finite_reaches_its_whole_image(backend: str, bad: float) -> None:
    model, hidden = packed_vit(), torch.randn(2, 17, 128)
    use(model, backend)
    wanted = model.encoder(hidden, 17)
    hidden[0, 3, 100] = bad
    found = model.encoder(hidden, 17)
    assert found[0].isnan().all() and torch.equal(found[1], wanted[1])


def dense(n: int, k: int) -> cpu.Dense:
    return torch.ones(n, k, dtype=torch.int8), torch.ones(n), None


def test_an_encoder_and_its_layers_are_freed_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    operators, made, freed = torch.ops.ternary, [], []
    for kind in ("linear", "encoder"):
        create, free = getattr(operators, f"{kind}_create"), getattr(operators, f"{kind}_free")
        create = partial(lambda kind, create, *args: made.append((kind, create(*args))) or made[-1][1], kind, create)
        free = partial(lambda kind, free, handle: freed.append((kind, handle)) or free(handle), kind, free)
        monkeypatch.setattr(operators, f"{kind}_create", create)
        monkeypatch.setattr(operators, f"{kind}_free", free)
    layer = cpu.EncoderLayer(dense(96, 32), dense(32, 32), dense(64, 32), dense(32, 64), [torch.ones(32)] * 4)
    cpu.Encoder([layer], 2, 1e-6, 8)
    gc.collect()
    assert len(made) == 5 and sorted(made) == sorted(freed)


def test_an_encoder_takes_more_tokens_than_before() -> None:
    """As one that never had fewer."""
    layer = cpu.EncoderLayer(dense(96, 32), dense(32, 32), dense(64, 32), dense(32, 64), [torch.rand(32)] * 4)
    encoder, hidden = cpu.Encoder([layer], 2, 1e-6, 8), torch.randn(2, 700, 32)
    for tokens in (3, 700, 40):
        wanted = cpu.Encoder([layer], 2, 1e-6, 8)(hidden[:, :tokens], tokens)
        assert torch.equal(encoder(hidden[:, :tokens], tokens), wanted)


def test_what_does_not_fit_together_is_refused() -> None:
    norms = [torch.ones(32)] * 4
    good = cpu.EncoderLayer(dense(96, 32), dense(32, 32), dense(64, 32), dense(32, 64), norms)
    hidden = torch.randn(1, 3, 32)
    encoder = cpu.Encoder([good], 2, 1e-6, 8)
    assert encoder(hidden, 2).shape == (1, 2, 32) and encoder(hidden[:0], 3).shape == (0, 3, 32)
    with pytest.raises(ValueError, match="heads are a multiple of 16"):
        cpu.Encoder([good], 4, 1e-6, 8)
    bad = cpu.EncoderLayer(dense(96, 32), dense(32, 32), dense(64, 32), dense(32, 48), norms)
    with pytest.raises(ValueError, match="do not fit together"):
        cpu.Encoder([bad], 2, 1e-6, 8)
    with pytest.raises(ValueError, match="more than 1023 layers"):
        cpu.Encoder([good] * 1024, 2, 1e-6, 8)
    with pytest.raises(ValueError, match=r"\(images, tokens, 32\)"):
        encoder(torch.randn(1, 3, 31), 1)
    with pytest.raises(ValueError, match="of 3 tokens the first 4 can't be kept"):
        encoder(hidden, 4)
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="takes hidden states, not images"):
        encoder(images, 1)
    with pytest.raises(ValueError, match="what comes out has another shape"):
        encoder.classify(hidden)

    def vit(inputs: int = 48, tokens: int = 5, width: int = 32) -> cpu.Encoder:
        patches = torch.ones(width, 3, 4, inputs // 12, dtype=torch.int8), torch.ones(width), None
        embedding = cpu.Embedding(patches, (8, 8), torch.zeros(3), torch.ones(3), torch.zeros(tokens, width))
        head = cpu.Head((torch.ones(width), torch.zeros(width)), dense(7, width))
        return cpu.Encoder([good], 2, 1e-6, 8, embedding=embedding, head=head)

    assert vit().classify(images).shape == (2, 7) and vit().classify(images[:0]).shape == (0, 7)
    for wrong in ({"tokens": 4}, {"width": 48}, {"inputs": 24}):  # 24: patches that are half as wide, so more of them
        with pytest.raises(ValueError, match="of an encoder does not fit its layers"):
            vit(**wrong)
    with pytest.raises(ValueError, match=r"images must be \(batch, 3, 8, 8\)"):
        vit().classify(torch.rand(2, 3, 8, 9))


def test_encoders_that_are_not_whole_are_refused() -> None:
    norm = torch.ones(32)
    shapes = {"qkv": (96, 32), "out": (32, 32), "fc1": (64, 32), "fc2": (32, 64)}
    parts: dict[str, Any] = {name: dense(*shape) for name, shape in shapes.items()} | {"norms": [norm] * 4}
    good = cpu.EncoderLayer(**parts)
    with pytest.raises(ValueError, match="heads are a multiple of 16"):
        cpu.Encoder([good], 0, 1e-6, 8)
    wrong = [{"qkv": dense(96, 48)}, {"qkv": dense(64, 32)}, {"out": dense(32, 48)}, {"out": dense(48, 32)},
             {"fc1": dense(64, 48)}, {"fc2": dense(48, 64)}]  # fmt: skip
    wrong += [{"norms": [norm] * i + [norm[1:]] + [norm] * (3 - i)} for i in range(4)]
    for change in wrong:
        with pytest.raises(ValueError, match="the layers of an encoder do not fit together"):
            cpu.Encoder([good, cpu.EncoderLayer(**(parts | change))], 2, 1e-6, 8)
    with pytest.raises(ValueError, match="a layer has four tensors and four linear layers"):
        cpu.Encoder([cpu.EncoderLayer(**(parts | {"norms": [norm] * 3}))], 2, 1e-6, 8)
    images, hidden, ops = torch.rand(2, 3, 8, 8), torch.randn(1, 3, 32), torch.ops.ternary
    patches = torch.ones(32, 3, 4, 4, dtype=torch.int8), torch.ones(32), None
    embedding = cpu.Embedding(patches, (8, 8), torch.zeros(3), torch.ones(3), torch.zeros(5, 32))
    head = cpu.Head((norm, norm), dense(7, 32))

    def vit(**options: Any) -> cpu.Encoder:
        return cpu.Encoder([good], 2, 1e-6, 8, **{"embedding": embedding, "head": head} | options)

    whole = vit()
    for wrong in ({"embedding": replace(embedding, std=torch.ones(2))}, {"head": replace(head, norm=(norm, norm[1:]))},
                  {"head": replace(head, norm=(norm[1:], norm))}, {"head": replace(head, classifier=dense(7, 48))}):
        with pytest.raises(ValueError, match="of an encoder does not fit its layers"):
            vit(**wrong)
    with pytest.raises(ValueError, match="an embedding or a head is not complete"):
        vit(head=replace(head, norm=(norm,)))
    linears = [cpu.Linear(*dense(*shape), 8) for shape in (*shapes.values(), (32, 48))]
    handles = [linear._handle for linear in linears]
    create = partial(ops.encoder_create, cpu.choose_isa("cpu"), 2, 1e-6, [norm] * 4, handles[:4])
    with pytest.raises(ValueError, match="a patch has a height and a width"):
        create([torch.zeros(5, 32), torch.zeros(3), torch.ones(3)], [8, 8, -4, -4, handles[4]], [], [])
    for tail, sentence in (([2, 31], "what comes out has another shape"), ([6], "what comes out has another shape"),
                           ([2, 32, 0], "can't be kept"), ([], "can't be kept")):
        with pytest.raises(ValueError, match=sentence):
            ops.encoder_run(images, whole._handle, tail)
    for x in (images[:, :, :, 1:], images[:, :, 1:], images[:, 1:]):
        with pytest.raises(ValueError, match=r"images must be \(batch, 3, 8, 8\)"):
            whole.classify(x)
    for x in (hidden[0], hidden[..., 1:]):
        with pytest.raises(ValueError, match=r"hidden states must be \(images, tokens, 32\)"):
            whole(x, 1)
