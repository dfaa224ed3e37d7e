"""The walk over the layers of a Flax model: order, inputs, what is seen and what is not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from curvax import pruning


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="first")(x))
        x = nn.relu(nn.Dense(12, name="second")(x))
        return nn.Dense(4, name="head")(x)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def params_of(module, *arguments):
    return module.init(jax.random.key(7), *arguments)["params"]


def walk(module, inputs, sparsity=0.5, **options):
    """The result for two batches of the inputs."""
    half = len(inputs) // 2
    batches = [inputs[:half], inputs[half:]]
    return pruning.prune_layers(module, params_of(module, inputs), batches, sparsity, **options)


def assert_same(one, other, **tolerances):
    np.testing.assert_allclose(one, other, **({"rtol": 1e-3, "atol": 1e-5} | tolerances))


def test_a_layer_sees_what_the_pruned_layers_before_it_give():
    inputs = normal(64, 8)
    params = params_of(MLP(), inputs)
    result = walk(MLP(), inputs, distribution="uniform")
    hidden, by_hand = inputs, {}
    for name in ("first", "second", "head"):
        by_hand[name] = pruning.prune_layer(params[name]["kernel"], hidden, 0.5)
        hidden = nn.relu(hidden @ by_hand[name].kernel + params[name]["bias"])
    assert [layer.path for layer in result.layers] == [
        "first/kernel",
        "second/kernel",
        "head/kernel",
    ]
    for layer in result.layers:
        name = layer.path.removesuffix("/kernel")
        assert_same(result.params[name]["kernel"], by_hand[name].kernel)
        np.testing.assert_array_equal(result.mask[name]["kernel"], by_hand[name].mask)
        assert layer.error == pytest.approx(by_hand[name].error, rel=1e-3)
        assert layer.num_rows == 64


def test_layers_are_pruned_as_they_are_called_not_as_they_are_named():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="a")(nn.Dense(8, name="z")(x))

    result = walk(Model(), normal(64, 8))
    assert [layer.path for layer in result.layers] == ["z/kernel", "a/kernel"]


AXES = {"automatic": jax.sharding.AxisType.Auto, "explicit": jax.sharding.AxisType.Explicit}


def gathered(x):
    """What a user of explicit axes writes where an activation is to be whole along its units."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.are_all_axes_auto:
        return x
    return jax.sharding.reshard(x, jax.NamedSharding(mesh, jax.P("data")))


class ShardedNNX(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(gathered(nnx.relu(self.first(x))))


class ShardedLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="head")(gathered(nn.relu(nn.Dense(16, name="first")(x))))


@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("library", ["Linen", "NNX"])
def test_a_model_on_a_mesh_is_pruned_as_on_one_device(library, kind):
    """Batches along one axis, the first layer's units along the other."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AXES[kind],) * 2)

    def placed(tree, *spec):
        return jax.device_put(tree, jax.NamedSharding(mesh, jax.P(*spec)))

    inputs = normal(64, 5, 8)
    if library == "Linen":
        model = ShardedLinen()
        params = params_of(model, inputs)
    else:
        model = ShardedNNX(nnx.Rngs(0))
        params = nnx.state(model, nnx.Param)
    spread = placed(params)
    spread["first"]["kernel"] = placed(params["first"]["kernel"], None, "model")
    spread["first"]["bias"] = placed(params["first"]["bias"], "model")
    halves = inputs[:32], inputs[32:]
    single = pruning.prune_layers(model, params, halves, 0.5)
    sharded = pruning.prune_layers(model, spread, [placed(x, "data") for x in halves], 0.5)
    jax.tree.map(assert_same, sharded.params, single.params)
    jax.tree.map(np.testing.assert_array_equal, sharded.mask, single.mask)
    for leaf, own in zip(jax.tree.leaves(sharded.params), jax.tree.leaves(spread), strict=True):
        assert leaf.sharding == own.sharding


def test_leaves_that_are_not_pruned_stay_as_they_are():
    inputs = normal(64, 8)
    params = params_of(MLP(), inputs)
    result = walk(MLP(), inputs, {"second": 0.75, "head": 0.25})
    assert [layer.sparsity for layer in result.layers] == [0.75, 0.25]
    np.testing.assert_array_equal(result.params["first"]["kernel"], params["first"]["kernel"])
    np.testing.assert_array_equal(result.params["head"]["bias"], params["head"]["bias"])
    assert jax.tree.structure(result.mask) == jax.tree.structure(params)
    assert np.all(result.mask["first"]["kernel"])
    assert result.sparsity == pytest.approx((144 + 12) / 240)


@pytest.mark.parametrize("sparsity", [0.6, {"first|head": 0.7, "second": 0.2}])
def test_small_layers_are_pruned_less_as_without_inputs(sparsity):
    inputs = normal(64, 8)
    params = params_of(MLP(), inputs)
    result = walk(MLP(), inputs, sparsity)
    by_magnitude = pruning.prune(params, None, sparsity, method="magnitude", distribution="erk")
    kept = {layer.path: layer.kept for layer in result.layers}
    assert kept == {layer.path: layer.kept for layer in by_magnitude.layers}
    assert len({layer.sparsity for layer in result.layers}) == 3


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int32, bool])
def test_inputs_of_integers_are_summed_as_the_numbers_they_are(dtype):
    inputs = jax.random.randint(jax.random.key(3), (64, 8), 0, 120).astype(dtype)
    result, wide = walk(MLP(), inputs), walk(MLP(), inputs.astype(jnp.float32))
    jax.tree.map(assert_same, result.params, wide.params)
    jax.tree.map(np.testing.assert_array_equal, result.mask, wide.mask)


def test_a_mask_prunes_what_the_walk_does_not_reach_too():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8, name="first")(x))
            return nn.Dense(2, name="head")(Custom(name="own")(x))

    inputs = normal(64, 8)
    params = params_of(Net(), inputs)
    params = jax.tree.map(lambda leaf: leaf + 0.01 * normal(*leaf.shape), params)
    chosen = pruning.prune(params, None, 0.5, method="random", select=lambda *_: True)
    with pytest.warns(UserWarning, match="1 selected kernels were not pruned"):
        result = pruning.prune_layers(Net(), params, [inputs], None, mask=chosen.mask)
    assert [layer.path for layer in result.unseen] == ["own/kernel"]
    for leaf, kept in zip(
        jax.tree.leaves(result.params), jax.tree.leaves(chosen.mask), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(leaf)[~np.asarray(kept)], 0)
    jax.tree.map(np.testing.assert_array_equal, result.mask, chosen.mask)


def test_a_layer_whose_inputs_are_zero_is_named_and_left():
    inputs = normal(64, 8)
    params = params_of(MLP(), inputs)
    params["first"]["bias"] = jnp.full(16, -100.0)
    params["second"]["bias"] = jnp.ones(12)
    with pytest.warns(UserWarning, match="second/kernel: its inputs are all zero"):
        result = pruning.prune_layers(MLP(), params, [inputs], 0.5)
    assert [layer.path for layer in result.layers] == ["first/kernel", "head/kernel"]


class Doubled(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        return super().__call__(2 * inputs)


class Standardized(nn.Dense):
    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value / jnp.linalg.norm(value) if name == "kernel" else value


class Renamed(nn.Dense):
    """Nothing of its own."""


@pytest.mark.parametrize("layer", [Doubled, Standardized])
def test_a_subclass_that_changes_its_layer_is_named(layer):
    model = nn.Sequential([layer(8), Renamed(4)])
    with pytest.warns(
        UserWarning, match="layers_0/kernel: its class overrides methods of the Flax layer"
    ):
        result = walk(model, normal(64, 8))
    assert [layer.path for layer in result.layers] == ["layers_1/kernel"]


def test_batches_may_come_from_an_iterator():
    inputs = normal(64, 8)
    params = params_of(MLP(), inputs)
    one = pruning.prune_layers(MLP(), params, iter([inputs[:9], inputs[9:]]), 0.5)
    two = pruning.prune_layers(MLP(), params, [inputs], 0.5)
    assert_same(one.params["head"]["kernel"], two.params["head"]["kernel"])


def test_many_batches_are_compiled_once_for_each_layer(caplog):
    inputs = normal(64, 8)
    params = params_of(MLP(), inputs)
    pruning.prune_layers(MLP(), params, [inputs[:8]] * 2, 0.5)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        pruning.prune_layers(MLP(), params, [inputs[:8]] * 4, 0.5)
    compiled = [record for record in caplog.records if "Compiling jit(run)" in record.message]
    assert len(compiled) == 3


def test_the_call_may_have_arguments_and_other_collections():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
            return nn.Dense(4)(nn.relu(x))

        def features(self, x):
            return self(x, False)

    inputs = normal(64, 8)
    variables = Model().init(jax.random.key(0), inputs, False)
    results = [
        pruning.prune_layers(
            Model(),
            variables["params"],
            [inputs],
            0.5,
            variables={"batch_stats": variables["batch_stats"]},
            call=call,
        )
        for call in (lambda module, x: module(x, train=False), "features")
    ]
    for result in results:
        assert [layer.path for layer in result.layers] == ["Dense_0/kernel", "Dense_1/kernel"]
    assert_same(results[0].params["Dense_1"]["kernel"], results[1].params["Dense_1"]["kernel"])


def test_a_mask_and_n_of_m_reach_every_layer():
    inputs = normal(64, 8)
    params = params_of(MLP(), inputs)
    first = walk(MLP(), inputs, None, structure=pruning.NM(2, 4))
    second = pruning.prune_layers(
        MLP(), first.params, [inputs], None, structure=pruning.NM(1, 4), mask=first.mask
    )
    for name in params:
        groups = np.asarray(second.mask[name]["kernel"]).reshape(-1, 4, params[name]["bias"].size)
        assert np.all(groups.sum(axis=1) == 1)
        assert not np.any(second.mask[name]["kernel"] & ~first.mask[name]["kernel"])


# Layers of other kinds.


def test_convolutions_are_pruned_by_their_patches():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), strides=2, padding="VALID", name="one")(x)
            x = nn.Conv(5, (3,), kernel_dilation=2, padding="CAUSAL", name="two")(x)
            return nn.Dense(3, name="head")(x.reshape(len(x), -1))

    images = normal(40, 9, 9, 3)
    params = params_of(Model(), images)
    result = walk(Model(), images, {"one": 0.5, "two": 0.5})
    patches = pruning.conv_patches(images, (3, 3), strides=2, padding="VALID")
    by_hand = pruning.prune_layer(params["one"]["kernel"], patches, 0.5)
    assert_same(result.params["one"]["kernel"], by_hand.kernel)
    hidden = nn.Conv(4, (3, 3), strides=2, padding="VALID").apply(
        {"params": result.params["one"]}, images
    )
    patches = pruning.conv_patches(hidden, (3,), dilation=2, padding="CAUSAL")
    by_hand = pruning.prune_layer(params["two"]["kernel"], patches, 0.5, layout="WIO")
    assert_same(result.params["two"]["kernel"], by_hand.kernel)


def test_attention_is_pruned_projection_by_projection():
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    inputs = normal(16, 5, 8)
    params = params_of(model, inputs)
    result = walk(model, inputs)
    assert [layer.path for layer in result.layers] == [
        f"{name}/kernel" for name in ("query", "key", "value", "out")
    ]
    for name in ("query", "key", "value"):
        by_hand = pruning.prune_layer(params[name]["kernel"], inputs, 0.5, layout="IOO")
        assert_same(result.params[name]["kernel"], by_hand.kernel)
    assert result.layers[-1].num_features == 8
    assert result.layers[-1].sparsity == 0.5


def test_dense_general_and_einsum_contract_any_axes():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            one = nn.DenseGeneral(6, axis=(1, 3), name="general")(x)
            two = nn.Einsum((3, 4, 6), "abcd,bdo->aco", name="einsum")(x)
            three = nn.Einsum((6, 2, 4), "...d,hkd->...hk", use_bias=False, name="heads")(x)
            return one + two + three.sum()

    inputs = normal(30, 3, 5, 4)
    params = params_of(Model(), inputs)
    result = walk(Model(), inputs, distribution="uniform")
    rows = jnp.moveaxis(inputs, 1, 2).reshape(-1, 3, 4)
    for name in ("general", "einsum"):
        by_hand = pruning.prune_layer(params[name]["kernel"], rows, 0.5, layout="IIO")
        assert_same(result.params[name]["kernel"], by_hand.kernel)
    by_hand = pruning.prune_layer(params["heads"]["kernel"], inputs, 0.5, layout="OOI")
    assert_same(result.params["heads"]["kernel"], by_hand.kernel)


def test_a_layer_called_twice_sees_all_of_its_inputs():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.Dense(8, name="shared")
            return nn.Dense(2, name="head")(shared(nn.relu(shared(x))))

    inputs = normal(64, 8)
    params = params_of(Model(), inputs)
    result = walk(Model(), inputs, distribution="uniform")
    kernel, bias = params["shared"]["kernel"], params["shared"]["bias"]
    both = [inputs, nn.relu(inputs @ kernel + bias)]
    assert_same(result.params["shared"]["kernel"], pruning.prune_layer(kernel, both, 0.5).kernel)
    assert result.layers[0].num_rows == 128


@pytest.mark.parametrize("transform", [nn.remat, nn.jit])
def test_layers_inside_remat_and_jit_are_seen(transform):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="head")(transform(MLP)(name="block")(x))

    result = walk(Model(), normal(64, 8))
    assert len(result.layers) == 4
    assert result.unseen == ()


def test_partitioned_parameters_keep_their_boxes():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", None))
    model = nn.Sequential([nn.Dense(8, kernel_init=init), nn.relu, nn.Dense(4)])
    inputs = normal(64, 8)
    params = params_of(model, inputs)
    result = walk(model, inputs)
    assert jax.tree.structure(result.params) == jax.tree.structure(params)
    assert result.layers[0].path == "layers_0/kernel"


def test_bfloat16_models_stay_bfloat16():
    model = nn.Dense(8, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    result = walk(model, normal(64, 8))
    assert result.params["kernel"].dtype == jnp.bfloat16
    assert result.layers[0].sparsity == 0.5


# What the walk cannot see.


class Custom(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 8))


def test_a_module_of_ones_own_is_named_and_left_alone():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="head")(Custom(name="own")(x))

    inputs = normal(64, 8)
    with pytest.warns(UserWarning, match=r"1 selected kernels were not pruned \(own/kernel: no"):
        result = walk(Model(), inputs)
    assert [layer.path for layer in result.unseen] == ["own/kernel"]
    kernel = params_of(Model(), inputs)["own"]["kernel"]
    np.testing.assert_array_equal(result.params["own"]["kernel"], kernel)
    assert "own/kernel   not pruned" in result.table()


@pytest.mark.parametrize("broadcast", [True, False])
def test_layers_inside_scan_are_named(broadcast):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8, name="inner")(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"variable_broadcast": "params"} if broadcast else {}
            options |= {} if broadcast else {"variable_axes": {"params": 0}}
            scan = nn.scan(Block, split_rngs={"params": not broadcast}, length=3, **options)
            x, _ = scan(name="blocks")(x, None)
            return nn.Dense(4, name="head")(x)

    with pytest.warns(UserWarning, match="blocks/inner/kernel: its"):
        result = walk(Model(), normal(64, 8))
    assert [layer.path for layer in result.layers] == ["head/kernel"]
    assert np.all(result.mask["blocks"]["inner"]["kernel"])


@pytest.mark.parametrize("transform", ["nn.scan", "jax.vmap", "jax.lax.map"])
def test_a_layer_with_a_further_call_inside_a_transform_is_named(transform):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.Dense(8, name="shared")
            x = shared(x)
            if transform == "nn.scan":
                x, _ = nn.scan(
                    lambda layer, x, _: (layer(x), None),
                    variable_broadcast="params",
                    split_rngs={"params": False},
                    length=3,
                )(shared, x, None)
            else:
                x = jax.vmap(shared)(x) if transform == "jax.vmap" else jax.lax.map(shared, x)
            return nn.Dense(4, name="head")(x)

    with pytest.warns(UserWarning, match="shared/kernel: its inputs are inside a transform"):
        result = walk(Model(), normal(64, 8))
    assert [layer.path for layer in result.layers] == ["head/kernel"]


def test_layers_inside_vmap_are_named():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            members = nn.vmap(
                nn.Dense,
                in_axes=None,
                axis_size=3,
                variable_axes={True: 0},
                split_rngs={True: True},
            )
            return nn.Dense(4, name="head")(members(8, name="members")(x).mean(0))

    with pytest.warns(UserWarning, match="members/kernel: .*stacked"):
        result = walk(Model(), normal(64, 8))
    assert [layer.path for layer in result.layers] == ["head/kernel"]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv(8, (3,), feature_group_count=2), "has groups"),
        (nn.Conv(8, (3,), padding=1, input_dilation=2), "dilates the inputs"),
        (nn.Conv(8, (3,), padding="SAME_LOWER"), "padding 'SAME_LOWER' is not supported"),
        (nn.ConvTranspose(8, (3,)), "no Flax layer"),
        (nn.Einsum((5, 4, 8), "abi,bio->abo"), "batch axes in the kernel"),
        (nn.DenseGeneral(8, batch_dims=(0,)), "batch axes"),
        (nn.WeightNorm(nn.Dense(8)), "are inside a transform"),
    ],
)
def test_layers_with_other_kernels_are_named_with_the_reason(layer, reason):
    model = nn.Sequential([layer, nn.Dense(3)])
    inputs = normal(64, 5, 4)
    params = params_of(model, inputs)
    with pytest.warns(UserWarning, match=reason):
        result = pruning.prune_layers(model, params, [inputs], 0.5)
    assert len(result.layers) == 1


def test_a_layer_that_is_never_called_is_named():
    class Model(nn.Module):
        def setup(self):
            self.used, self.spare = nn.Dense(4), nn.Dense(4)

        def __call__(self, x):
            return self.used(x) + self.spare(x)

        def half(self, x):
            return self.used(x)

    with pytest.warns(UserWarning, match="spare/kernel: no Flax layer that has it"):
        result = walk(Model(), normal(64, 8), call="half")
    assert [layer.path for layer in result.layers] == ["used/kernel"]


def test_an_embedding_is_not_selected():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(4, name="head")(nn.Embed(20, 8)(tokens))

    tokens = jax.random.randint(jax.random.key(0), (40, 6), 0, 20)
    result = walk(Model(), tokens)
    assert [layer.path for layer in result.layers] == ["head/kernel"]
    assert result.unseen == ()


def test_few_inputs_warn_once():
    with pytest.warns(UserWarning, match="first/kernel: 4 for 8, second/kernel: 4 for 16"):
        walk(MLP(), normal(4, 8))


# NNX.


class NNXMLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(16, 12, rngs=rngs)])
        self.head = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.head(x)


def test_nnx_is_pruned_as_linen_is():
    inputs = normal(64, 8)
    params = params_of(MLP(), inputs)
    model = NNXMLP(nnx.Rngs(0))
    places = {"first": model.first, "second": model.blocks[0], "head": model.head}
    for name, layer in places.items():
        layer.kernel[...] = params[name]["kernel"]
        layer.bias[...] = params[name]["bias"]
    linen = walk(MLP(), inputs)
    result = pruning.prune_layers(model, None, [inputs[:32], inputs[32:]], 0.5)
    assert [layer.path for layer in result.layers] == [
        "first/kernel",
        "blocks/0/kernel",
        "head/kernel",
    ]
    np.testing.assert_array_equal(model.head.kernel[...], params["head"]["kernel"])
    assert type(model.head) is nnx.Linear
    nnx.update(model, result.params)
    for name, layer in places.items():
        assert_same(layer.kernel[...], linen.params[name]["kernel"])


def test_nnx_layers_that_share_a_kernel_add_up():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.one = nnx.Linear(8, 8, rngs=rngs)
            self.two = nnx.Linear(8, 8, rngs=rngs)
            self.two.kernel = self.one.kernel

        def __call__(self, x):
            return self.two(self.one(x))

    result = pruning.prune_layers(Model(nnx.Rngs(0)), None, [normal(64, 8)], 0.5)
    assert [(layer.path, layer.num_rows) for layer in result.layers] == [("one/kernel", 128)]


def test_nnx_attention_and_convolutions_are_pruned():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3,), strides=2, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

        def __call__(self, x):
            return self.attention(self.conv(x))

    inputs = normal(40, 8, 3)
    model = Model(nnx.Rngs(0))
    result = pruning.prune_layers(model, None, [inputs], 0.5, distribution="uniform")
    assert [layer.path for layer in result.layers] == [
        "conv/kernel",
        *(f"attention/{name}/kernel" for name in ("query", "key", "value", "out")),
    ]
    patches = pruning.conv_patches(inputs, (3,), strides=2)
    by_hand = pruning.prune_layer(model.conv.kernel[...], patches, 0.5, layout="WIO")
    assert_same(result.params["conv"]["kernel"][...], by_hand.kernel)


def test_an_nnx_layer_whose_kernel_is_normalized_is_named():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.normalized = nnx.WeightNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
            self.head = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.normalized(x))

    with pytest.warns(UserWarning, match="layer_instance/kernel: it computes with a kernel"):
        result = pruning.prune_layers(Model(nnx.Rngs(0)), None, [normal(64, 8)], 0.5)
    assert [layer.path for layer in result.layers] == ["head/kernel"]


def test_nnx_layers_inside_transforms_are_named():
    class Model(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))
            self.stacked = make(rngs.split(3))
            self.inner = nnx.Linear(8, 8, rngs=rngs)
            self.head = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.stacked
            )
            x = nnx.remat(lambda layer, x: layer(x))(self.inner, x)
            return self.head(x)

    with pytest.warns(UserWarning, match="2 selected kernels were not pruned"):
        result = pruning.prune_layers(Model(nnx.Rngs(0)), None, [normal(64, 8)], 0.5)
    assert [layer.path for layer in result.layers] == ["head/kernel"]
    assert {layer.path for layer in result.unseen} == {"stacked/kernel", "inner/kernel"}


# Wrong input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be a number in \[0.0, 1.0\)"),
        ({"sparsity": {"head": 2.0}}, r"sparsity\['head'\] must be a number"),
        ({"sparsity": {"tail": 0.5}}, r"sparsity\['tail'\] matches no selected leaf"),
        ({"sparsity": None}, "sparsity=None needs a mask"),
        ({"method": "fisher"}, "method must be one of"),
        ({"distribution": "global"}, "distribution must be one of"),
        ({"distribution": "erk", "structure": pruning.NM(2, 4)}, "drop the structure"),
        ({"structure": pruning.NM(2, 5), "sparsity": None}, "first/kernel: its fan-in of 8 is not"),
        ({"select": lambda path, leaf: False}, "select chooses no leaf of params"),
        ({"batches": []}, "batches are empty"),
        ({"sparsity": {}}, "at least one pattern"),
        ({"sparsity": {"(": 0.5}}, "sparsity keys must be valid patterns"),
        ({"batches": [jnp.full((9, 8), jnp.nan)]}, "the inputs of first/kernel must be finite"),
        ({"params": None}, "a Linen module needs params"),
        ({"mask": {"first": np.ones(3, bool)}}, "mask must match params"),
        ({"model": lambda x: x}, "model must be a Flax module"),
        ({"model": NNXMLP(nnx.Rngs(0)), "variables": {}}, "variables are only for Linen"),
        ({"model": Custom(), "params": {"kernel": jnp.ones((8, 8))}}, "none of the selected"),
    ],
)
def test_wrong_input_is_refused_with_a_sentence(options, message):
    inputs = normal(64, 8)
    arguments = {
        "model": MLP(),
        "params": params_of(MLP(), inputs),
        "batches": [inputs],
        "sparsity": 0.5,
    }
    with pytest.raises(ValueError, match=message):
        pruning.prune_layers(**(arguments | options))


def test_layers_that_groups_do_not_fill_are_listed_and_stay():
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(2)])
    inputs = jax.random.normal(jax.random.key(0), (64, 6))
    params = model.init(jax.random.key(1), inputs)["params"]
    with pytest.warns(UserWarning, match="layers_0/kernel: its fan-in of 6 is not divisible by 4"):
        result = pruning.prune_layers(model, params, [inputs], None, structure=pruning.NM(2, 4))
    assert [layer.path for layer in result.layers] == ["layers_2/kernel"]
    assert [layer.path for layer in result.unseen] == ["layers_0/kernel"]
    np.testing.assert_array_equal(result.params["layers_0"]["kernel"], params["layers_0"]["kernel"])


class WithOwnKernels(nn.Module):
    """Two layers that are seen, and between them two kernels that the walk cannot see."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, name="first")(x)
        for name, shape in (("wide_kernel", (32, 256)), ("narrow_kernel", (256, 32))):
            x = jnp.tanh(x @ self.param(name, nn.initializers.lecun_normal(), shape))
        return nn.Dense(8, name="last")(x)


@pytest.mark.filterwarnings("ignore:2 selected kernels")
@pytest.mark.parametrize("sparsity", [0.5, {"first|last": 0.5, "wide|narrow": 0.7}])
def test_the_sparsity_is_that_of_the_layers_that_are_seen(sparsity):
    inputs = normal(256, 32)
    params = params_of(WithOwnKernels(), inputs)
    result = pruning.prune_layers(WithOwnKernels(), params, [inputs], sparsity)
    assert abs(result.sparsity - 0.5) < 0.001
    assert {layer.path for layer in result.layers} == {"first/kernel", "last/kernel"}


def test_layers_that_share_their_inputs_have_rows_of_their_own():
    class Shortcut(nn.Module):
        @nn.compact
        def __call__(self, x):
            shortcut = nn.Conv(4, (1, 1), name="shortcut")(x).mean((1, 2))
            return shortcut + nn.Conv(4, (4, 4), strides=4, name="down")(x).mean((1, 2))

    images = normal(8, 8, 8, 4)
    params = params_of(Shortcut(), images)
    with pytest.warns(UserWarning, match="fewer input rows than features.*down/kernel: 32 for"):
        result = pruning.prune_layers(Shortcut(), params, [images], 0.5)
    assert [layer.num_rows for layer in result.layers] == [8 * 64, 8 * 4]


def test_arguments_that_are_no_arrays_reach_the_call_as_they_are():
    class Switched(nn.Module):
        @nn.compact
        def __call__(self, x, train, mode):
            x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(6)(x))
            return nn.Dense(3)(x if mode == "plain" else -x)

    inputs = normal(64, 4)
    params = Switched().init(jax.random.key(0), inputs, False, "plain")["params"]
    flagged = pruning.prune_layers(Switched(), params, [(inputs, False, "plain")], 0.5)
    bound = pruning.prune_layers(
        Switched(), params, [inputs], 0.5, call=lambda module, x: module(x, False, "plain")
    )
    jax.tree.map(np.testing.assert_array_equal, flagged.params, bound.params)


def test_all_remaining_weights_are_counted():
    inputs = normal(64, 4)
    params = params_of(MLP(), inputs)
    result = pruning.prune_layers(MLP(), params, [inputs], 0.5)
    kept = sum(layer.kept for layer in result.layers)
    biases = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 1)
    assert result.num_kept == kept + biases
    assert "model" in result.table()


def test_a_mask_that_empties_a_layer_is_said():
    inputs = normal(64, 4)
    params = params_of(MLP(), inputs)
    mask = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    mask["head"]["kernel"] = jnp.zeros_like(mask["head"]["kernel"])
    with pytest.warns(UserWarning, match="mask keeps no weights in head/kernel"):
        pruning.prune_layers(MLP(), params, [inputs], None, mask=mask)
