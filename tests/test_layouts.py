"""What the axes of a leaf are, tried on every layer of Linen, NNX, Equinox and Haiku."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import curvax
from curvax import pruning
from curvax._layouts import check_layout, is_no_kernel, kernel_layout
from curvax._trees import named_leaves

IMAGE, LINE, VOLUME = (2, 8, 8, 3), (2, 8, 3), (2, 8, 8, 8, 3)
KEY = jax.random.key(0)


def letters(tree, layout="auto"):
    """The letters of each leaf of two axes and more, '' for what is no kernel."""
    found = {
        name: kernel_layout(name, leaf.shape, layout)
        for name, leaf in named_leaves(tree)
        if len(leaf.shape) > 1
    }
    return {name: layout.letters if layout else "" for name, layout in found.items()}


def kernels(tree):
    """The letters of what is a kernel."""
    return {name: layout for name, layout in letters(tree).items() if layout}


# Linen


class Holder(nn.Module):
    """Gives a layer its automatic name."""

    layer: object

    @nn.compact
    def __call__(self, *inputs):
        return self.layer()(*inputs)


def linen(layer, *shapes, dtype=jnp.float32):
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    keys = {"params": KEY, "dropout": KEY}
    return jax.eval_shape(Holder(layer).init, keys, *inputs)["params"]


stacked = functools.partial(
    nn.vmap, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=4
)
boxed = nn.with_partitioning(nn.initializers.ones, (None,) * 4)
logically_boxed = nn.with_logical_partitioning(nn.initializers.ones, (None,) * 4)


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (lambda: nn.Conv(5, (3,)), LINE, "WIO"),
        (lambda: nn.Conv(5, (3, 3)), IMAGE, "HWIO"),
        (lambda: nn.Conv(5, (1, 3)), IMAGE, "HWIO"),
        (lambda: nn.Conv(5, (2, 3)), IMAGE, "?WIO"),  # or two members of one axis
        (lambda: nn.Conv(5, (3, 3, 3)), VOLUME, "?HWIO"),  # or three members of two axes
        (lambda: nn.Conv(6, (3, 3), feature_group_count=3), IMAGE, "HWIO"),
        (lambda: nn.Conv(5, (3, 3), kernel_init=boxed), IMAGE, "HWIO"),
        (lambda: nn.Conv(5, (3, 3), kernel_init=logically_boxed), IMAGE, "HWIO"),
        (lambda: nn.ConvTranspose(5, (3, 3)), IMAGE, "HWIO"),
        (lambda: nn.ConvLocal(5, (3, 3)), IMAGE, "LLIO"),
        (lambda: nn.Conv(5, (3, 3), name="stem"), IMAGE, "HWIO"),
        (lambda: nn.Conv(5, (8, 8), name="patch_embed"), IMAGE, "HWIO"),
        (lambda: nn.Conv(5, (16, 16), name="embedding"), (1, 16, 16, 3), "HWIO"),
        (lambda: nn.Dense(5), IMAGE, "IO"),
        (lambda: nn.Dense(5, name="conv_next"), IMAGE, "IO"),
        (lambda: nn.DenseGeneral((4, 5)), IMAGE, "???"),
        (lambda: nn.DenseGeneral(5, axis=(-2, -1)), LINE, "???"),
        (lambda: nn.DenseGeneral((8, 5), axis=(-3, -2)), IMAGE, "????"),
        (lambda: nn.DenseGeneral(5, axis=-1, batch_dims=0), LINE, "???"),
        (lambda: nn.Einsum((3, 4, 5), "...a,abc->...bc"), LINE, "???"),
        (lambda: nn.Einsum((3, 3, 4, 5), "...a,abcd->...bcd"), LINE, "????"),
        (lambda: nn.SimpleCell(4), ((2, 4), (2, 3)), "IO"),
        (lambda: nn.GRUCell(4), ((2, 4), (2, 3)), "IO"),
        (lambda: nn.MGUCell(4), ((2, 4), (2, 3)), "IO"),
        (lambda: nn.RNN(nn.LSTMCell(4)), LINE, "IO"),
        (lambda: nn.RNN(nn.OptimizedLSTMCell(4)), LINE, "IO"),
        (lambda: nn.RNN(nn.ConvLSTMCell(4, (3,))), (2, 5, 8, 3), "WIO"),
        (lambda: nn.RNN(nn.ConvLSTMCell(4, (3, 3))), (2, 5, 8, 8, 3), "HWIO"),
        (lambda: stacked(nn.Dense)(5), IMAGE, "LIO"),
        (lambda: stacked(nn.Conv)(5, (3,)), LINE, "LWIO"),
        (lambda: stacked(nn.Conv)(5, (3, 3)), IMAGE, "LHWIO"),
        (lambda: stacked(nn.Conv)(5, (3, 3, 3)), VOLUME, "LDHWIO"),
        (lambda: stacked(nn.Conv)(5, (3, 3), name="stem"), IMAGE, "?HWIO"),
        (lambda: stacked(stacked(nn.Dense), axis_size=2)(5), IMAGE, "LLIO"),
    ],
)
def test_kernels_of_linen(layer, shape, expected):
    shapes = shape if isinstance(shape[0], tuple) else [shape]
    found = kernels(linen(layer, *shapes))
    assert found
    assert set(found.values()) == {expected}


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm,
        nn.RMSNorm,
        nn.InstanceNorm,
        lambda: nn.GroupNorm(1),
        lambda: nn.BatchNorm(use_running_average=False),
        lambda: nn.LayerNorm(reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3)),
        lambda: nn.PReLU(),
    ],
)
def test_norms_of_linen_are_no_kernels(layer):
    assert not kernels(linen(layer, IMAGE))


@pytest.mark.parametrize("layer", [nn.Embed, stacked(nn.Embed)])
def test_embeddings_of_linen_are_no_kernels(layer):
    tree = linen(lambda: layer(7, 4), (3,), dtype=jnp.int32)
    assert set(letters(tree).values()) == {""}


@pytest.mark.parametrize(("wrap", "lead"), [(lambda layer: layer, ""), (stacked, "L")])
def test_attention_of_linen(wrap, lead):
    found = kernels(linen(lambda: wrap(nn.MultiHeadDotProductAttention)(2), (2, 5, 8)))
    for name, layout in found.items():
        assert layout == lead + ("IIO" if "/out/" in name else "IOO")
    assert len(found) == 4


class Block(nn.Module):
    @nn.compact
    def __call__(self, inputs, _):
        return nn.Conv(3, (3, 3))(inputs) + nn.Dense(3, name="mix")(inputs), None


@pytest.mark.parametrize("block", [Block, nn.remat(Block)])
def test_a_scanned_block_of_linen_is_a_stack(block):
    def layer():
        scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return lambda inputs: scanned()(inputs, None)

    assert sorted(kernels(linen(layer, IMAGE)).values()) == ["LHWIO", "LIO"]


def test_parameters_that_a_scan_shares_are_no_stack():
    """``nn.scan`` with ``variable_broadcast`` gives its name but no axis."""
    assert kernel_layout("ScanBlock_0/Dense_0/kernel", (4, 5)).letters == "IO"
    shared = kernel_layout("ScanBlock_0/Conv_0/kernel", (3, 3, 4, 5))
    assert shared.letters == "?WIO"  # or three kernels of width three


@pytest.mark.parametrize("norm", [nn.WeightNorm, nn.SpectralNorm])
def test_wrapped_layers_of_linen(norm):
    def layer():
        options = {} if norm is nn.WeightNorm else {"update_stats": False}
        return lambda inputs: norm(nn.Conv(5, (3, 3)))(inputs, **options)

    assert kernels(linen(layer, IMAGE)) == {"Conv_0/kernel": "HWIO"}


# NNX


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 3, (3, 3), rngs=rngs)
        self.line = nnx.Conv(3, 3, (3,), rngs=rngs)
        self.fc = nnx.Linear(3, 3, rngs=rngs)
        self.mha = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.embed = nnx.Embed(7, 4, rngs=rngs)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (lambda rngs: nnx.Conv(3, 5, (3, 3), rngs=rngs), {"HWIO"}),
        (lambda rngs: nnx.Conv(3, 5, (3,), rngs=rngs), {"???"}),  # nothing says that it is one
        (lambda rngs: nnx.ConvTranspose(3, 5, (3, 3), rngs=rngs), {"HWIO"}),
        (lambda rngs: nnx.Linear(3, 5, rngs=rngs), {"IO"}),
        (lambda rngs: nnx.LinearGeneral((3, 4), (5, 6), axis=(-2, -1), rngs=rngs), {"????"}),
        (lambda rngs: nnx.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), rngs=rngs), {"???"}),
        (lambda rngs: nnx.Embed(7, 4, rngs=rngs), set()),
        (lambda rngs: nnx.LayerNorm(4, rngs=rngs), set()),
        (lambda rngs: nnx.RMSNorm(4, rngs=rngs), set()),
        (lambda rngs: nnx.BatchNorm(4, rngs=rngs), set()),
        (lambda rngs: nnx.GroupNorm(4, 2, rngs=rngs), set()),
        (lambda rngs: nnx.InstanceNorm(4, rngs=rngs), set()),
        (lambda rngs: nnx.PReLU(), set()),
        (lambda rngs: nnx.WeightNorm(nnx.Conv(3, 5, (3, 3), rngs=rngs), rngs=rngs), {"HWIO"}),
        (lambda rngs: nnx.SpectralNorm(nnx.Conv(3, 5, (3, 3), rngs=rngs), rngs=rngs), {"HWIO"}),
        (lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs), {"???"}),
        (lambda rngs: nnx.LoRA(3, 2, 5, rngs=rngs), {"IO"}),
        (lambda rngs: nnx.LoRALinear(3, 5, lora_rank=2, rngs=rngs), {"IO"}),
        (lambda rngs: nnx.LSTMCell(3, 4, rngs=rngs), {"IO"}),
        (lambda rngs: nnx.OptimizedLSTMCell(3, 4, rngs=rngs), {"IO"}),
        (lambda rngs: nnx.GRUCell(3, 4, rngs=rngs), {"IO"}),
        (lambda rngs: nnx.SimpleCell(3, 4, rngs=rngs), {"IO"}),
    ],
)
def test_kernels_of_nnx(layer, expected):
    model = nnx.eval_shape(lambda: layer(nnx.Rngs(0)))
    assert set(kernels(nnx.state(model, nnx.Param)).values()) == expected


def test_a_stack_of_nnx():
    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def members(rngs):
        return Net(rngs)

    params = nnx.state(nnx.eval_shape(lambda: members(nnx.Rngs(0))), nnx.Param)
    found = kernels(params)
    assert found["stem/kernel"] == "?HWIO"
    assert found["fc/kernel"] == "LIO"
    assert found["line/kernel"] == "????"
    assert found["mha/query/kernel"] == found["mha/out/kernel"] == "????"
    assert "embed/embedding" not in found
    told = letters(params, {"": "L..."})
    assert told["stem/kernel"] == "LHWIO"
    assert told["fc/kernel"] == "LIO"


def test_wrappers_of_variables_and_optimizer_states_are_transparent():
    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    expected = letters(state)
    assert expected["stem/kernel"] == "HWIO"
    assert letters(nnx.to_pure_dict(state)) == expected
    optimizer = nnx.eval_shape(
        lambda: nnx.Optimizer(Net(nnx.Rngs(0)), optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    )
    moments = letters(nnx.state(optimizer, nnx.optimizer.OptState))
    endings = {name.partition("trace/")[2]: found for name, found in moments.items()}
    assert endings == expected
    assert kernel_layout("stem/kernel/value", (3, 3, 1, 4)).letters == "HWIO"


# Equinox


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (lambda: eqx.nn.Linear(3, 5, key=KEY), {"OI"}),
        (lambda: {"conv": eqx.nn.Conv1d(3, 5, 3, key=KEY)}, {"OIW"}),
        (lambda: eqx.nn.Conv1d(3, 5, 3, key=KEY), {"???"}),
        (lambda: eqx.nn.Conv2d(3, 5, 3, key=KEY), {"OIHW"}),
        (lambda: {"conv": eqx.nn.Conv2d(3, 5, (2, 3), key=KEY)}, {"???W"}),
        (lambda: eqx.nn.Conv3d(3, 5, 3, key=KEY), {"???HW"}),
        (lambda: {"conv3d": eqx.nn.Conv3d(3, 5, 3, key=KEY)}, {"OIDHW"}),
        (lambda: eqx.nn.ConvTranspose2d(3, 5, 3, key=KEY), {"OIHW"}),
        (lambda: {"embed": eqx.nn.Embedding(7, 4, key=KEY)}, set()),
        (lambda: {"norm": eqx.nn.LayerNorm((3, 4, 5))}, set()),
        (lambda: eqx.nn.LayerNorm((3, 4, 5)), {"???"}),
        (lambda: eqx.nn.GroupNorm(2, 4), set()),
        (lambda: eqx.nn.RMSNorm(4), set()),
        (lambda: eqx.nn.MultiheadAttention(2, 8, key=KEY), {"OI"}),
        (lambda: eqx.nn.GRUCell(3, 4, key=KEY), {"OI"}),
        (lambda: eqx.nn.LSTMCell(3, 4, key=KEY), {"OI"}),
        (lambda: eqx.nn.MLP(3, 4, 5, 2, key=KEY), {"OI"}),
        (lambda: eqx.nn.WeightNorm(eqx.nn.Conv2d(3, 5, 3, key=KEY), "weight"), {"OIHW"}),
        (lambda: eqx.nn.PReLU(), set()),
    ],
)
def test_kernels_of_equinox(layer, expected):
    params = eqx.filter(eqx.filter_eval_shape(layer), lambda leaf: hasattr(leaf, "shape"))
    assert set(kernels(params).values()) == expected


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (lambda key: {"linear": eqx.nn.Linear(3, 5, key=key)}, {"LOI"}),
        (lambda key: eqx.nn.MLP(3, 4, 5, 1, key=key), {"???"}),
        (lambda key: eqx.nn.Conv2d(16, 5, 3, key=key), {"LOIHW"}),
        (lambda key: eqx.nn.Conv2d(3, 5, 3, key=key), {"???HW"}),  # or a window of three axes
    ],
)
def test_a_stack_of_equinox(layer, expected):
    members = eqx.filter_eval_shape(eqx.filter_vmap(layer), jax.random.split(KEY, 4))
    params = eqx.filter(members, lambda leaf: hasattr(leaf, "shape"))
    assert set(kernels(params).values()) == expected


# Haiku


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (lambda hk: hk.Linear(5), LINE, {"IO"}),
        (lambda hk: hk.Conv1D(5, 3), LINE, {"WIO"}),
        (lambda hk: hk.Conv2D(5, 3), IMAGE, {"HWIO"}),
        (lambda hk: hk.Conv2D(5, 3, name="stem"), IMAGE, {"HWIO"}),
        (lambda hk: hk.Conv3D(5, 3), VOLUME, {"DHWIO"}),
        (lambda hk: hk.Conv1DTranspose(5, 3), LINE, {"WOI"}),
        (lambda hk: hk.Conv2DTranspose(5, 3), IMAGE, {"HWOI"}),
        (lambda hk: hk.DepthwiseConv2D(2, 3), IMAGE, {"HWIO"}),
        (lambda hk: hk.SeparableDepthwiseConv2D(2, 3), IMAGE, {"HWIO"}),
        (lambda hk: hk.LayerNorm((1, 2, 3), True, True), IMAGE, set()),
        (lambda hk: lambda x: hk.BatchNorm(True, True, 0.9)(x, True), IMAGE, set()),
        (lambda hk: hk.Bias(), IMAGE, set()),
        (lambda hk: lambda x: hk.Embed(7, 4)(x[0, 0].astype(int)), LINE, set()),
        (lambda hk: lambda x: hk.GRU(4)(x, jnp.zeros((2, 4))), (2, 3), {"IO"}),
        (lambda hk: hk.nets.MLP([4, 5]), LINE, {"IO"}),
        (lambda hk: hk.layer_stack(4)(lambda x: hk.Linear(3)(x)), LINE, {"LIO"}),
        (lambda hk: hk.layer_stack(4)(lambda x: hk.Conv2D(3, 3)(x)), IMAGE, {"LHWIO"}),
    ],
)
def test_kernels_of_haiku(layer, shape, expected):
    hk = pytest.importorskip("haiku")
    function = hk.transform_with_state(lambda inputs: layer(hk)(inputs))
    params, _ = jax.eval_shape(function.init, KEY, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert set(kernels(params).values()) == expected
    assert all(found in expected for found in letters(params, "haiku").values() if found)


# Names alone


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("conv/bias", (3, 3, 8, 8)),
        ("conv/kernel_scale", (3, 3, 8, 8)),
        ("norm/scale", (3, 3, 4, 5)),
        ("pos_embedding", (3, 3, 8, 8)),
        ("embed/weight", (7, 4)),
        ("attention/relative_position_bias_table", (3, 3, 8, 8)),
        ("rel_embedding", (3, 3, 8)),
        ("biases/0", (3, 3, 8, 8)),
        ("conv2_d/b", (3, 3, 8, 8)),
    ],
)
def test_a_name_that_is_no_kernels_counts_before_the_rank(path, shape):
    assert is_no_kernel(path, len(shape))
    assert kernel_layout(path, shape) is None
    assert not pruning.is_kernel(path, jnp.ones(shape))


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("pos/kernel", (8, 8, 4, 16), "????"),
        ("q_einsum/w", (8, 8, 4, 16), "????"),
        ("layers/wq/kernel", (8, 8, 16, 64), "????"),
        ("attention/out/kernel", (4, 4, 8, 32), "????"),  # four layers of four heads
        ("blocks/out/kernel", (4, 4, 8, 32), "????"),
        ("blocks/conv_out/kernel", (4, 4, 8, 32), "HWIO"),
        ("decoder/out/kernel", (3, 3, 8, 32), "HWIO"),
        ("DenseGeneral_0/kernel", (4, 4, 8, 32), "????"),
        ("experts/kernel", (4, 8, 32), "LIO"),
        ("experts/wi/kernel", (4, 4, 8, 32), "????"),
        ("experts/conv/kernel", (3, 3, 8, 32), "?WIO"),
        ("ConvNeXtBlock_0/mix/kernel", (4, 8, 32), "???"),
        ("ConvNeXtBlock_0/Dense_0/kernel", (4, 8, 32), "LIO"),
        ("conv/0/kernel", (3, 8, 32), "WIO"),
        ("features.0.weight", (8, 3, 5, 5), "OIHW"),
        ("conv1.weight", (3, 3, 2, 4), "HWIO"),  # the published names in Flax's order
        ("conv1.weight", (8, 8, 1, 7), "???W"),
        ("layers/0", (4, 5), "??"),
        ("conv1", (3, 3, 4, 8), "HWIO"),
        ("conv1", (8, 4, 3, 3), "OIHW"),
        ("conv1", (3, 3, 3, 3), "????"),
        ("w1", (3, 3, 4, 8), "????"),
    ],
)
def test_where_names_and_sizes_leave_a_choice_the_axes_are_open(path, shape, expected):
    assert kernel_layout(path, shape).letters == expected


# What the user says


@pytest.mark.oldest
def test_a_preset_fixes_the_order_of_axes():
    shape = (3, 3, 3, 3)
    found = [
        kernel_layout("conv", shape, preset).letters for preset in ("flax", "out_first", "haiku")
    ]
    assert found == ["HWIO", "OIHW", "HWIO"]
    assert kernel_layout("w1", (4, 5), "out_first").letters == "OI"
    assert kernel_layout("up_transpose/kernel", shape, "haiku").letters == "HWOI"


@pytest.mark.oldest
def test_a_mapping_names_patterns_and_the_first_that_fits_counts():
    layout = {"^a/": "LIO", "a|b": curvax.KernelLayout((1,), (0, 2)), "c": None, "d": "out_first"}
    found = [kernel_layout(f"{name}/kernel", (4, 5, 6), layout) for name in "abcdx"]
    shown = [layout and layout.letters for layout in found]
    assert shown == ["LIO", "OIO", None, "???", "???"]


@pytest.mark.oldest
def test_dots_leave_the_axes_after_a_stack_to_the_guess():
    def guess(path, shape):
        found = kernel_layout(path, shape, {"layers": "L..."})
        return found and found.letters

    assert guess("layers/stem/kernel", (4, 3, 3, 8, 16)) == "LHWIO"
    assert guess("layers/conv/kernel", (4, 2, 3, 8, 16)) == "LHWIO"
    assert guess("layers/conv/kernel", (4, 3, 3, 3, 8, 16)) == "LDHWIO"
    assert guess("layers/mix/weight", (4, 16, 8)) == "LOI"
    assert guess("layers/mix/bias", (4, 16)) is None


@pytest.mark.oldest
def test_a_function_of_path_and_shape_returns_letters_or_a_layout():
    def layout(path, shape):
        return None if path.endswith("b") else "OI" if len(shape) == 2 else curvax.KernelLayout()

    assert kernel_layout("x/w", (4, 5), layout).letters == "OI"
    assert kernel_layout("x/b", (4, 5), layout) is None
    assert kernel_layout("x/w", (4,), layout) is None


@pytest.mark.oldest
@pytest.mark.parametrize(
    "value", ["IO", "HWIOO", [0, 1], curvax.KernelLayout((0,), (1,)), ((2,), (3,))]
)
def test_a_layout_that_does_not_fit_the_rank_is_an_error_that_says_what_to_do(value):
    sentence = r"for conv/kernel, which has shape \(3, 3, 4, 8\): name each of its 4 axes once"
    with pytest.raises(ValueError, match=sentence):
        kernel_layout("conv/kernel", (3, 3, 4, 8), {"conv": value})


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        ("HWIO", "layout must be one of 'auto', 'flax', 'out_first', 'haiku', 'a mapping"),
        ({"conv": "NHWC"}, "the letters I, O, D, H, W, L and \\?, got 'NHWC'"),
        ({"(": "IO"}, "patterns for re.search, got '\\('"),
        ({0: "IO"}, "patterns for re.search, got 0"),
    ],
)
def test_what_is_no_layout_is_an_error_at_construction(layout, sentence):
    for construct in (
        check_layout,
        lambda layout: curvax.adahessian(0.1, layout=layout),
        lambda layout: pruning.prune({}, None, 0.5, method="magnitude", layout=layout),
    ):
        with pytest.raises(ValueError, match=sentence):
            construct(layout)


@pytest.mark.oldest
def test_letters_and_axes_are_the_same():
    for word in ("IO", "OIW", "LHWIO", "DHWIO", "?WIO", "IOO", "DDHWIO", "??"):
        assert curvax.KernelLayout.from_letters(word).letters == word
    layout = curvax.KernelLayout.from_letters("LHWIO")
    assert layout == curvax.KernelLayout((3,), (4,), spatial=(1, 2), stacked=(0,))


# Where it counts


def curvature(params, diag, **options):
    tx = curvax.scale_by_adahessian(**options)
    _, state = tx.update(params, tx.init(params), params, hessian_diag=diag)
    return jax.tree.map(lambda nu: np.sqrt(nu / state.nu_weight), state.nu)


@pytest.mark.oldest
@pytest.mark.parametrize("averaging", ["conv", "row", "block", "paper"])
@pytest.mark.parametrize(
    "path",
    ["ScanBlock_0/Conv_0", "Conv_0", "VmapConv_0", "ensemble/conv", "ScanBlock_0/Dense_0", "fc"],
)
def test_members_of_a_stack_share_nothing(averaging, path):
    shape = (2, 4, 5) if "onv" not in path else (2, 3, 3, 1, 4)
    diag = np.abs(np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    params = {path: {"kernel": jnp.ones(shape)}}
    whole = curvature(params, {path: {"kernel": diag}}, averaging=averaging)[path]["kernel"]
    for member in range(2):
        one = {path.split("/")[-1].removeprefix("Vmap"): {"kernel": diag[member]}}
        alone = jax.tree.leaves(curvature(one, one, averaging=averaging))[0]
        np.testing.assert_allclose(whole[member], alone, rtol=1e-6)


@pytest.mark.oldest
@pytest.mark.parametrize("averaging", ["conv", "row", "block"])
def test_out_first_kernels_are_averaged_like_transposed_ones(averaging):
    rng = np.random.default_rng(1)
    in_first = {
        "conv": {"kernel": rng.random((3, 3, 4, 8), np.float32)},
        "fc": {"kernel": rng.random((40, 8), np.float32)},
    }
    out_first = {
        "conv": {"weight": in_first["conv"]["kernel"].transpose(3, 2, 0, 1)},
        "fc": {"weight": in_first["fc"]["kernel"].T},
    }
    expected = curvature(in_first, in_first, averaging=averaging)
    found = curvature(out_first, out_first, averaging=averaging)
    turned = np.transpose(found["conv"]["weight"], (2, 3, 1, 0))
    np.testing.assert_allclose(turned, expected["conv"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(found["fc"]["weight"].T, expected["fc"]["kernel"], rtol=1e-6)


@pytest.mark.oldest
def test_the_optimizers_take_a_layout():
    params = {"mix": {"kernel": jnp.arange(1.0, 25.0).reshape(2, 3, 4)}}
    own = curvature(params, params, averaging="row")["mix"]["kernel"]
    np.testing.assert_allclose(own, params["mix"]["kernel"], rtol=1e-6)
    rows = curvature(params, params, averaging="row", layout={"mix": "LIO"})["mix"]["kernel"]
    expected = np.broadcast_to(np.mean(params["mix"]["kernel"], axis=1, keepdims=True), (2, 3, 4))
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
    tx = curvax.adahessian(0.1, layout={"mix": "IO"})
    with pytest.raises(ValueError, match="layout gives 'IO' for mix/kernel"):
        tx.update(params, tx.init(params), params, hessian_diag=params)


@pytest.mark.oldest
def test_averaging_table_shows_what_each_leaf_is_taken_for():
    params = {
        "conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 4, 8), jnp.float32), "bias": jnp.ones(8)},
        "mix": [jnp.ones((2, 3)), 1.0],
    }
    lines = curvax.averaging_table(params, "row").splitlines()
    assert [re.split(r"\s{2,}", line) for line in lines] == [
        ["path", "shape", "layout", "averaged"],
        ["conv/bias", "(8,)", "-", "-"],
        ["conv/kernel", "(3, 3, 4, 8)", "HWIO", "(0, 1)"],
        ["mix/0", "(2, 3)", "??", "-"],
        ["mix/1", "()", "-", "-"],
    ]
    block = curvax.averaging_table(params, "block", layout="flax").splitlines()[3]
    assert block.endswith("IO      Block(length=32, axis=0)")
    own = curvax.averaging_table(params, lambda path, shape: (-1,) if shape else ())
    assert own.count("(-1,)") == 3


def pruned(params, structure, sparsity=0.5, **options):
    result = pruning.prune(
        params, None, sparsity, method="magnitude", structure=structure, **options
    )
    return jax.tree.leaves(result.mask)[0]


@pytest.mark.oldest
def test_output_units_are_rows_of_an_out_first_weight():
    mask = pruned({"weight": jnp.arange(6.0).reshape(2, 3)}, pruning.OutputUnits())
    np.testing.assert_array_equal(mask, [[False] * 3, [True] * 3])
    mask = pruned({"conv": {"weight": jnp.arange(72.0).reshape(2, 4, 3, 3)}}, pruning.OutputUnits())
    np.testing.assert_array_equal(mask.reshape(2, 36).sum(axis=1), [0, 36])


@pytest.mark.oldest
def test_output_units_of_a_stack_are_those_of_each_member():
    kernel = jnp.arange(12.0).reshape(2, 2, 3)
    mask = pruned({"dense": {"kernel": kernel}}, pruning.OutputUnits(), 0.25)
    expected = np.ones((2, 2, 3), bool)
    expected[0, :, 0] = False  # two weights; the next unit would make four of twelve
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.oldest
@pytest.mark.parametrize("structure", [pruning.NM(2, 4), pruning.WeightBlocks(4)])
@pytest.mark.parametrize(
    ("path", "shape", "axis"),
    [
        ("weight", (3, 8), 1),
        ("conv/weight", (3, 8, 5), 1),
        ("stem/weight", (4, 8, 3, 3), 1),
        ("conv2_d_transpose/w", (3, 3, 5, 8), 3),
        ("VmapDense_0/kernel", (3, 8, 5), 1),
        ("MultiHeadDotProductAttention_0/out/kernel", (2, 8, 5), 1),
    ],
)
def test_groups_run_along_the_fan_in_of_any_layout(structure, path, shape, axis):
    weights = jnp.asarray(np.random.default_rng(2).standard_normal(shape), jnp.float32)
    mask = pruned({path: weights}, structure)
    groups = np.moveaxis(np.asarray(mask), axis, -1).reshape(-1, 4).sum(axis=1)
    assert set(groups) <= ({2} if isinstance(structure, pruning.NM) else {0, 4})


@pytest.mark.oldest
@pytest.mark.parametrize(
    "structure", [pruning.NM(2, 4), pruning.WeightBlocks(4), pruning.OutputUnits()]
)
def test_an_open_axis_is_refused_by_structures_until_a_layout_names_it(structure):
    weights = np.random.default_rng(2).standard_normal((4, 4, 4))
    params = {"mix": {"kernel": jnp.asarray(weights, jnp.float32)}}
    sentence = r"mix/kernel: its fan-in.*\(read as '\?\?\?'\): name them with layout=.*'LIO'"
    with pytest.raises(ValueError, match=sentence):
        pruned(params, structure)
    assert pruned(params, structure, layout={"mix": "LIO"}).mean() == 0.5
    assert pruned(params, None).mean() == 0.5


@pytest.mark.oldest
def test_gradual_pruning_takes_a_layout():
    params = {"mix": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    options = {
        "method": "magnitude",
        "structure": pruning.OutputUnits(),
        "layout": {"mix": "OI"},
    }
    result = pruning.prune_gradually(None, params, [], [0.5], lambda p, mask: p, **options)
    np.testing.assert_array_equal(result.mask["mix"]["kernel"], [[False] * 3, [True] * 3])
