"""The U-Net, against one written again in float64 NumPy, and against numbers known of the paper's."""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpm_jax.keys import image_keys
from ddpm_jax.unet import AttentionBlock, GroupNorm, ResnetBlock, UNet, check_unet, dropout, time_embedding

CIFAR10 = UNet()
TWO_LEVELS = UNet(channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=())
CELEBAHQ256 = UNet(channel_mult=(1, 1, 2, 2, 4, 4), dropout=0.0)


def shapes_of(unet, image=(32, 32, 3)):
    """The parameters' shapes and types, without computing them."""
    x, t = jax.ShapeDtypeStruct((1, *image), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(unet.init, jax.random.key(0), x, t)["params"]


def count(shapes):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def draw_again(shapes, seed=0):
    """Weights of a size that keeps the signal's, all different: the near-zero initial ones would hide errors."""
    random = np.random.default_rng(seed)

    def leaf_of(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return jnp.asarray(random.normal(size=leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1])), jnp.float32)
        return jnp.asarray((name == "scale") + 0.2 * random.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf_of, shapes)


def double(x):
    return x.repeat(2, 1).repeat(2, 2)


def halve(x):
    return sum(x[:, i::2, j::2] for i in range(2) for j in range(2)) / 4


class Reference:
    """The network of the paper in float64 NumPy, of the parameters of ours."""

    def __init__(self, params, unet):
        self.params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        self.unet = unet

    @staticmethod
    def swish(x):
        return x / (1 + np.exp(-x))

    @staticmethod
    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def conv(self, p, x, stride=1):
        # The paper's padding at stride 2 is (0, 1): nothing above and left, one row below and one column right.
        before = 1 if stride == 1 or self.unet.symmetric_downsampling else 0
        x = np.pad(x, [(0, 0), (before, 1), (before, 1), (0, 0)])
        height, width = (x.shape[1] - 3) // stride + 1, (x.shape[2] - 3) // stride + 1
        taps = (
            x[:, i : i + stride * height : stride, j : j + stride * width : stride] @ p["kernel"][i, j]
            for i in range(3)
            for j in range(3)
        )
        return sum(taps) + p["bias"]

    def norm(self, p, x):
        grouped = x.reshape(*x.shape[:3], self.unet.num_groups, -1)
        centred = grouped - grouped.mean((1, 2, 4), keepdims=True)
        variance = (centred**2).mean((1, 2, 4), keepdims=True)
        return (centred / np.sqrt(variance + self.unet.norm_eps)).reshape(x.shape) * p["scale"] + p["bias"]

    def resnet(self, p, x, embedding, resample=lambda x: x):
        h = self.conv(p["conv1"], resample(self.swish(self.norm(p["norm1"], x))))
        x = resample(x)
        projected = self.dense(p["temb_proj"], self.swish(embedding))[:, None, None, :]
        if self.unet.scale_shift_norm:
            channels = h.shape[-1]
            h = self.norm(p["norm2"], h) * (1 + projected[..., :channels]) + projected[..., channels:]
        else:
            h = self.norm(p["norm2"], h + projected)
        h = self.conv(p["conv2"], self.swish(h))
        return h + (self.dense(p["nin_shortcut"], x) if "nin_shortcut" in p else x)

    def attention(self, p, x):
        batch, height, width, channels = x.shape
        h = self.norm(p["norm"], x).reshape(batch, height * width, channels)
        num_heads = channels // self.unet.num_head_channels if self.unet.num_head_channels else self.unet.num_heads
        size, outputs = channels // num_heads, []
        q, k, v = (self.dense(p[name], h) for name in "qkv")
        for head in range(num_heads):
            part = slice(head * size, (head + 1) * size)
            logits = q[..., part] @ k[..., part].transpose(0, 2, 1) / np.sqrt(size)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            outputs.append(weights / weights.sum(-1, keepdims=True) @ v[..., part])
        return x + self.dense(p["proj_out"], np.concatenate(outputs, -1)).reshape(x.shape)

    def __call__(self, x, t):
        p, unet = self.params, self.unet
        width, levels, num_res_blocks = unet.embed_channels or unet.width, len(unet.channel_mult), unet.num_res_blocks
        attention_resolutions = unet.attention_resolutions
        frequencies = np.exp(-np.arange(width // 2) * np.log(10000) / (width // 2 - unet.freq_shift))
        angles = unet.timestep_scale * np.asarray(t, np.float64)[:, None] * frequencies
        waves = np.sin(angles), np.cos(angles)
        embedding = np.concatenate(waves[::-1] if unet.cos_first else waves, -1)
        embedding = self.dense(p["temb_dense1"], self.swish(self.dense(p["temb_dense0"], embedding)))

        h = self.conv(p["conv_in"], np.asarray(x, np.float64))
        skips = [h]
        for level in range(levels):
            for block in range(num_res_blocks):
                h = self.resnet(p[f"down_{level}_block_{block}"], h, embedding)
                if h.shape[1] in attention_resolutions:
                    h = self.attention(p[f"down_{level}_attn_{block}"], h)
                skips.append(h)
            if level < levels - 1:
                part = p[f"down_{level}_downsample"]
                h = self.resnet(part, h, embedding, halve) if unet.resblock_updown else self.conv(part, h, stride=2)
                skips.append(h)
        h = self.resnet(p["mid_block_1"], h, embedding)
        if unet.mid_attention:
            h = self.attention(p["mid_attn_1"], h)
        h = self.resnet(p["mid_block_2"], h, embedding)
        for level in reversed(range(levels)):
            for block in range(num_res_blocks + 1):
                h = self.resnet(p[f"up_{level}_block_{block}"], np.concatenate([h, skips.pop()], -1), embedding)
                if h.shape[1] in attention_resolutions:
                    h = self.attention(p[f"up_{level}_attn_{block}"], h)
            if level > 0:
                part = p[f"up_{level}_upsample"]
                h = self.resnet(part, h, embedding, double) if unet.resblock_updown else self.conv(part, double(h))
        assert not skips
        return self.conv(p["conv_out"], self.swish(self.norm(p["norm_out"], h)))


SMALL = dict(width=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(16,), num_groups=4)


@pytest.mark.parametrize(
    ("image", "options"),
    [
        ((16, 8, 3), {}),
        ((8, 16, 1), dict(num_heads=2, attention_resolutions=(4,), out_channels=2)),
        ((6, 2, 5), dict(num_res_blocks=2, out_channels=5, num_groups=2)),
        (
            (8, 8, 1),
            dict(
                attention_resolutions=(8, 4),
                num_head_channels=4,
                norm_eps=0.1,
                symmetric_downsampling=True,
                freq_shift=0,
                cos_first=True,
                out_channels=1,
            ),
        ),
        ((8, 8, 1), dict(mid_attention=False, out_channels=1)),
        (
            (8, 4, 1),
            dict(scale_shift_norm=True, resblock_updown=True, timestep_scale=0.25, embed_channels=12, out_channels=1),
        ),
    ],
)
def test_equals_the_network_written_again(image, options):
    unet = UNet(**{**SMALL, **options})
    shapes = shapes_of(unet, image)
    params = draw_again(shapes)
    x, t = jax.random.normal(jax.random.key(0), (3, *image)), jnp.array([0, 17, 999])
    actual = jax.jit(unet.apply)({"params": params}, x, t)
    chex.assert_shape(actual, (3, *image[:2], unet.out_channels))
    expected = Reference(params, unet)(x, t)
    assert expected.std() > 0.1
    np.testing.assert_allclose(actual, expected, atol=2e-5 * expected.std())


class TestParameters:
    @pytest.mark.parametrize(
        ("unet", "size", "expected"),
        [
            (CIFAR10, 32, 35_746_307),
            (CIFAR10.clone(out_channels=6), 32, 35_749_766),
            (UNet(channel_mult=(1, 2, 2, 2, 4)), 64, 78_700_803),
            (CELEBAHQ256, 256, 113_673_219),
            (CELEBAHQ256.clone(width=192), 256, 255_677_955),
        ],
        ids=["cifar10", "cifar10_learned_variance", "celeba64", "celebahq256", "lsun_bedroom256_large"],
    )
    def test_number(self, unet, size, expected):
        assert count(shapes_of(unet, (size, size, 3))) == expected

    @pytest.mark.parametrize(
        ("unet", "size", "arrays", "resnets", "shortcuts", "attentions"),
        [(CIFAR10, 32, 328, 22, 13, 6), (CELEBAHQ256, 256, 450, 32, 20, 6)],
        ids=["cifar10", "celebahq256"],
    )
    def test_number_of_arrays(self, unet, size, arrays, resnets, shortcuts, attentions):
        shapes = shapes_of(unet, (size, size, 3))
        assert len(jax.tree.leaves(shapes)) == arrays
        assert sum("conv1" in part for part in shapes.values()) == resnets
        assert sum("nin_shortcut" in part for part in shapes.values()) == shortcuts
        assert sum("proj_out" in part for part in shapes.values()) == attentions
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}

    def test_number_of_every_part_of_cifar10(self):
        shapes = shapes_of(CIFAR10)
        counts = {}
        for name, part in shapes.items():
            words = name.split("_")
            level = "_".join(words[:2]) if words[0] in ("down", "up") else words[0]
            kind = {"block": "resnets", "attn": "attentions"}.get(words[2], words[2]) if level != words[0] else "all"
            counts[level, kind] = counts.get((level, kind), 0) + count(part)
        assert counts == {
            ("temb", "all"): 328_704,
            ("conv", "all"): 3_584 + 3_459,  # conv_in, conv_out
            ("norm", "all"): 256,
            ("down_0", "resnets"): 722_688,
            ("down_0", "downsample"): 147_584,
            ("down_1", "resnets"): 2_362_880,
            ("down_1", "attentions"): 527_360,
            ("down_1", "downsample"): 590_080,
            ("down_2", "resnets"): 2_625_024,
            ("down_2", "downsample"): 590_080,
            ("down_3", "resnets"): 2_625_024,
            ("mid", "all"): 2_888_704,
            ("up_3", "resnets"): 6_102_528,
            ("up_3", "upsample"): 590_080,
            ("up_2", "resnets"): 6_102_528,
            ("up_2", "upsample"): 590_080,
            ("up_1", "resnets"): 5_774_592,
            ("up_1", "attentions"): 791_040,
            ("up_1", "upsample"): 590_080,
            ("up_0", "resnets"): 1_789_952,
        }

    def test_attention_is_at_height_16_and_in_the_middle(self):
        attentions = lambda unet, image: sorted(name for name in shapes_of(unet, image) if "attn" in name)
        up_and_down = [f"down_1_attn_{i}" for i in range(2)], [f"up_1_attn_{i}" for i in range(3)]
        assert attentions(CIFAR10, (32, 32, 3)) == [*up_and_down[0], "mid_attn_1", *up_and_down[1]]
        assert attentions(CIFAR10, (32, 64, 3)) == [*up_and_down[0], "mid_attn_1", *up_and_down[1]]
        assert attentions(CIFAR10, (8, 16, 3)) == ["mid_attn_1"]
        assert attentions(CIFAR10.clone(attention_resolutions=()), (32, 32, 3)) == ["mid_attn_1"]


@pytest.fixture(scope="module")
def initial():
    """The first two levels of the paper's widths, initialized."""
    return jax.jit(TWO_LEVELS.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1, jnp.int32))["params"]


class TestInitialization:
    @pytest.mark.parametrize(
        ("place", "shape", "limit"),
        [
            ("conv_in", (3, 3, 3, 128), 0.071337638),
            ("down_0_block_0/conv1", (3, 3, 128, 128), 0.051031036),
            ("down_1_block_0/conv1", (3, 3, 128, 256), 0.041666667),
            ("mid_block_1/conv1", (3, 3, 256, 256), 0.036084392),
            ("mid_attn_1/q", (256, 256), 0.10825318),
            ("temb_dense0", (128, 512), 0.096824584),
            ("temb_dense1", (512, 512), 0.076546554),
            ("mid_block_1/conv2", (3, 3, 256, 256), 3.6084392e-07),
            ("mid_attn_1/proj_out", (256, 256), 1.0825318e-06),
        ],
    )
    def test_is_uniform_up_to_its_limit(self, initial, place, shape, limit):
        layer = initial
        for part in place.split("/"):
            layer = layer[part]
        kernel = np.asarray(layer["kernel"], np.float64).ravel()
        assert layer["kernel"].shape == shape
        assert abs(kernel).max() <= limit * (1 + 1e-6)
        # Of 3456 uniform draws and more, the largest is within 1 % of the limit but for 1 in 10^15.
        assert abs(kernel).max() > 0.99 * limit
        assert stats.kstest(kernel[:50_000], stats.uniform(-limit, 2 * limit).cdf).pvalue > 1e-3
        np.testing.assert_array_equal(layer["bias"], 0)

    def test_norms_change_nothing_and_every_bias_is_zero(self, initial):
        for path, leaf in jax.tree_util.tree_leaves_with_path(initial):
            if path[-1].key in ("scale", "bias"):
                np.testing.assert_array_equal(leaf, path[-1].key == "scale")

    def test_untrained_network_says_almost_nothing(self, initial):
        x, t = jax.random.normal(jax.random.key(1), (2, 4, 4, 3)), jnp.array([0, 999])
        output = jax.jit(TWO_LEVELS.apply)({"params": initial}, x, t)
        assert 0 < float(jnp.abs(output).max()) < 1e-4


class TestGroupNorm:
    @pytest.mark.parametrize(("shape", "num_groups"), [((3, 5, 4, 12), 4), ((2, 1, 2, 8), 8), ((2, 3, 3, 8), 1)])
    def test_is_that_of_flax(self, shape, num_groups):
        theirs = nn.GroupNorm(num_groups, epsilon=1e-3, use_fast_variance=False)
        ours = GroupNorm(num_groups, 1e-3, jnp.float32)
        x = 3 + 2 * jax.random.normal(jax.random.key(0), shape)
        chex.assert_trees_all_equal_shapes_and_dtypes(*(norm.init(jax.random.key(0), x) for norm in (ours, theirs)))
        params = draw_again(jax.eval_shape(ours.init, jax.random.key(0), x))
        weights = jax.random.normal(jax.random.key(1), shape)
        loss = lambda norm: lambda params, x: (weights * norm.apply(params, x)).sum()
        actual, expected = (jax.jit(jax.value_and_grad(loss(norm), (0, 1)))(params, x) for norm in (ours, theirs))
        chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=1e-5)

    def test_statistics_of_bfloat16_are_float32(self):
        # 100 is exact in bfloat16 and its sums over 1024 pixels are not.
        x = (100 + jnp.arange(2048.0).reshape(1, 32, 32, 2) % 2).astype(jnp.bfloat16)
        norm = GroupNorm(1, 1e-6, jnp.bfloat16)
        actual = norm.apply(norm.init(jax.random.key(0), x), x)
        chex.assert_type(actual, jnp.bfloat16)
        np.testing.assert_allclose(np.asarray(actual, np.float32), np.asarray(x, np.float32) * 2 - 201, atol=1e-2)


class TestTimeEmbedding:
    @pytest.mark.parametrize(
        ("t", "entries", "total"),
        [
            (1, {0: 0.84147098, 1: 0.76043874, 63: 1e-4, 64: 0.54030231}, None),
            (10, {1: 0.70674982, 127: 0.9999995}, 54.096875),
            (999, {0: -0.026460753, 63: 0.099733916, 64: 0.99964985, 127: 0.99501414}, 13.498464),
        ],
    )
    def test_of_the_original(self, t, entries, total):
        embedding = np.asarray(time_embedding(jnp.array([t]), 128), np.float64)[0]
        chex.assert_shape(embedding, (128,))
        # A frequency is rounded to 1e-7 of itself and more, and the angle is up to 999 of them.
        tolerance = 1e-6 + 3e-7 * t
        np.testing.assert_allclose(embedding[list(entries)], list(entries.values()), atol=tolerance)
        if total is not None:
            np.testing.assert_allclose(embedding.sum(), total, atol=10 * tolerance)

    def test_at_time_zero(self):
        np.testing.assert_array_equal(time_embedding(jnp.array([0]), 128)[0], np.repeat([0.0, 1.0], 64))

    def test_of_odd_size_ends_in_zero(self):
        embedding = time_embedding(jnp.array([3, 500]), 9)
        chex.assert_shape(embedding, (2, 9))
        np.testing.assert_array_equal(embedding[:, :8], time_embedding(jnp.array([3, 500]), 8))
        np.testing.assert_array_equal(embedding[:, 8], 0)


class TestDropout:
    def test_keeps_the_rest_and_scales_it(self):
        x = jnp.full((16, 8, 8, 32), 3.0)
        dropped = np.asarray(dropout(x, image_keys(jax.random.key(0), jnp.arange(16)), 0.1), np.float64)
        np.testing.assert_allclose(np.unique(dropped), [0, 3 / 0.9], rtol=1e-6)
        n = dropped.size
        assert abs((dropped == 0).mean() - 0.1) < 4 * np.sqrt(0.1 * 0.9 / n)  # 4 standard deviations

    def test_of_an_image_comes_from_its_own_key(self):
        x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
        keys = image_keys(jax.random.key(0), jnp.arange(4))
        together = dropout(x, keys, 0.5)
        np.testing.assert_array_equal(together[2:3], dropout(x[2:3], keys[2:3], 0.5))
        masks = np.asarray(together != 0)
        assert not (masks[0] == masks[1]).all()

    def test_is_nothing_without_keys_or_rate(self):
        x = jnp.ones((2, 2, 2, 1))
        assert dropout(x, None, 0.5) is x
        assert dropout(x, image_keys(jax.random.key(0), jnp.arange(2)), 0.0) is x


@pytest.fixture(scope="module")
def small():
    """A small network with dropout, its parameters, and images."""
    unet = UNet(**{**SMALL, "dropout": 0.3})
    x, t = jax.random.normal(jax.random.key(0), (4, 16, 8, 3)), jnp.array([0, 17, 500, 999])
    return unet, draw_again(shapes_of(unet, (16, 8, 3))), x, t


class TestNetworkDropout:
    def test_depends_on_the_keys_alone_and_is_the_image_s_own(self, small):
        unet, params, x, t = small
        apply = jax.jit(lambda x, t, keys: unet.apply({"params": params}, x, t, dropout_keys=keys))
        keys = image_keys(jax.random.key(1), jnp.arange(4))
        together = apply(x, t, keys)
        np.testing.assert_array_equal(together, apply(x, t, keys))
        for i in (0, 3):
            alone = apply(x[i : i + 1], t[i : i + 1], keys[i : i + 1])
            np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-4)
        other = apply(x, t, keys.at[1].set(jax.random.key(9)))
        assert not np.allclose(other[1], together[1], atol=1e-2)
        np.testing.assert_array_equal(other[jnp.array([0, 2, 3])], together[jnp.array([0, 2, 3])])

    def test_is_off_without_keys(self, small):
        unet, params, x, t = small
        silent = unet.clone(dropout=0.0)
        evaluate = jax.jit(lambda params, x, t: unet.apply({"params": params}, x, t))(params, x, t)
        np.testing.assert_array_equal(evaluate, jax.jit(silent.apply)({"params": params}, x, t))

    def test_every_block_has_a_mask_of_its_own(self):
        # Two blocks of one shape: were their keys the same, so were the masks. What passes is seen at conv2's input.
        unet = UNet(width=8, channel_mult=(1,), num_res_blocks=2, attention_resolutions=(), num_groups=4, dropout=0.5)
        x, t = jnp.ones((1, 4, 4, 3)), jnp.zeros(1, jnp.int32)
        params = draw_again(shapes_of(unet, (4, 4, 3)))
        masks = []

        def watch(call, args, kwargs, context):
            if isinstance(context.module, nn.Conv) and context.module.name == "conv2":
                masks.append(np.asarray(args[0] == 0))
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            unet.apply({"params": params}, x, t, dropout_keys=image_keys(jax.random.key(0), jnp.arange(1)))
        assert len(masks) == 7
        for i in range(7):
            assert 0.2 < masks[i].mean() < 0.8
            assert all((masks[i] != masks[j]).mean() > 0.2 for j in range(i))


class TestRecomputing:
    def test_changes_no_name_and_no_shape(self, small):
        unet, *_ = small
        shapes = [shapes_of(each, (16, 8, 3)) for each in (unet, unet.clone(remat=True))]
        chex.assert_trees_all_equal_shapes_and_dtypes(*shapes)

    def test_keeps_less_for_the_gradient_which_is_the_same(self):
        unet = UNet(width=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4, dropout=0.1)
        params = draw_again(shapes_of(unet, (8, 8, 3)))
        keys = image_keys(jax.random.key(0), jnp.arange(2))
        x, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.array([3, 40], jnp.int32)
        kept, gradients = [], []
        for network in (unet, unet.clone(remat=True)):
            loss = lambda params, network=network: jnp.mean(
                network.apply({"params": params}, x, t, dropout_keys=keys) ** 2
            )
            backward = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params)
            kept.append(sum(leaf.size for leaf in jax.tree.leaves(backward)))
            gradients.append(jax.jit(jax.grad(loss))(params))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        assert kept[1] - parameters < (kept[0] - parameters) / 3
        scale = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(gradients[0]))
        chex.assert_trees_all_close(*gradients, rtol=1e-4, atol=1e-6 * scale)


class TestPrecision:
    def test_bfloat16_computes_and_float32_comes_out(self, small):
        unet, params, x, t = small
        half = unet.clone(dtype=jnp.bfloat16)
        chex.assert_trees_all_equal_shapes_and_dtypes(shapes_of(half, (16, 8, 3)), shapes_of(unet, (16, 8, 3)))
        actual, expected = (jax.jit(network.apply)({"params": params}, x, t) for network in (half, unet))
        chex.assert_type(actual, jnp.float32)
        chex.assert_tree_all_finite(actual)
        # bfloat16 has 8 bits: it is not the same, but near.
        error = float(jnp.std(actual - expected) / jnp.std(expected))
        assert 1e-4 < error < 0.1

    def test_attention_in_bfloat16_keeps_the_gradients_of_its_weights(self):
        x = jax.random.normal(jax.random.key(0), (2, 16, 16, 32))

        def gradient(dtype):
            block, images = AttentionBlock(1, 4, dtype), x.astype(dtype)
            params = draw_again(jax.eval_shape(block.init, jax.random.key(0), images)["params"])
            params["v"]["bias"] += 4  # which cancels in the gradient
            loss = lambda params: jnp.square(block.apply({"params": params}, images).astype(jnp.float32)).sum()
            return jax.jit(jax.grad(loss))(params)["q"]["kernel"]

        half, full = gradient(jnp.bfloat16), gradient(jnp.float32)
        assert jnp.linalg.norm(half - full) < 0.025 * jnp.linalg.norm(full)

    @pytest.mark.parametrize("block", [ResnetBlock(8, 4, 0.0, jnp.float32), AttentionBlock(1, 4, jnp.float32)])
    def test_variance_is_not_lost_far_from_zero(self, block):
        # Pixels of 1000 +- 1: E[x^2] - E[x]^2 in float32 would be off by 0.1 of the variance.
        x = 1000 + jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
        embedding = jax.random.normal(jax.random.key(1), (2, 16))
        rest = (embedding, None) if isinstance(block, ResnetBlock) else ()
        params = draw_again(jax.eval_shape(block.init, jax.random.key(0), x, *rest)["params"])
        reference = Reference(params, UNet(num_groups=4))
        part = (
            reference.resnet(reference.params, np.asarray(x, np.float64), np.asarray(embedding, np.float64))
            if rest
            else reference.attention(reference.params, np.asarray(x, np.float64))
        )
        actual = np.asarray(block.apply({"params": params}, x, *rest), np.float64) - np.asarray(x, np.float64)
        np.testing.assert_allclose(actual, part - np.asarray(x, np.float64), atol=2e-3)


def test_one_trace_serves_every_checkpoint(small):
    unet, params, x, t = small
    predict = jax.jit(chex.assert_max_traces(lambda params, x, t: unet.apply({"params": params}, x, t), 1))
    first = predict(params, x, t)
    assert not np.allclose(predict(draw_again(params, seed=1), x, t), first)
    assert not np.allclose(predict(params, x, t[::-1]), first)


class TestRefusals:
    def test_height_and_width(self):
        with pytest.raises(ValueError, match="image height 30 is not divisible by 8, as 4 levels need: use 24 or 32"):
            check_unet(CIFAR10, (30, 32))
        with pytest.raises(ValueError, match="image width 4 is not divisible by 8, as 4 levels need: use 8"):
            check_unet(CIFAR10, (32, 4))
        with pytest.raises(ValueError, match="image height 30"):
            shapes_of(CIFAR10, (30, 32, 3))
        check_unet(CIFAR10, (24, 40))

    def test_groups(self):
        with pytest.raises(ValueError, match=r"48 channels .* 32 groups: use model.num_groups 16"):
            check_unet(UNet(width=48), (32, 32))

    def test_heads(self):
        with pytest.raises(ValueError, match=r"128 channels .* 3 heads: use model.num_heads 1"):
            check_unet(UNet(num_heads=3), (32, 32))

    def test_width_of_heads(self):
        with pytest.raises(ValueError, match=r"256 channels .* 96 channels per head: use model.num_head_channels 32"):
            check_unet(UNet(num_head_channels=96), (32, 32))
        check_unet(UNet(width=32, num_head_channels=64), (32, 32))  # the first level, of 32 channels, has no attention
        with pytest.raises(ValueError, match="leave the first at 1, or the second at 0"):
            check_unet(UNet(num_heads=2, num_head_channels=64), (32, 32))

    def test_shift_of_the_frequencies(self):
        with pytest.raises(ValueError, match="freq_shift 2 must be less than 2, .* half of model width"):
            check_unet(UNet(width=4, num_groups=4, freq_shift=2), (32, 32))

    def test_times_that_are_not_one_an_image(self):
        x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        for shape in ((), (1,), (2, 1)):
            with pytest.raises(AssertionError):
                jax.eval_shape(CIFAR10.init, jax.random.key(0), x, jax.ShapeDtypeStruct(shape, jnp.int32))
