"""Where a ResNet-20 step on the CPU spends its time, and what other convolutions would change.

    python benchmarks/conv_variants.py
    XLA_FLAGS=--xla_cpu_use_thunk_runtime=false python benchmarks/conv_variants.py

The same network with four ways to write a 3x3 convolution: gradient, and gradient with the
Hessian's diagonal in one pass. The flags of XLA come from the environment; the table names them.
"""

import argparse
import functools
import os
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import models_flax
import timing

import curvax


class Convolution(nn.Module):
    """A 3x3 convolution with padding 1; subclasses say how it is computed."""

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] | int = 1
    padding: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        stride = self.strides if isinstance(self.strides, int) else self.strides[0]
        return self.convolve(x, kernel, stride)

    def convolve(self, x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
        raise NotImplementedError

    def shifted(self, x: jax.Array, stride: int) -> list[jax.Array]:
        """The nine inputs that the nine entries of a spatial kernel see."""
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        height, width = x.shape[1:3]
        return [
            padded[:, i : i + height : stride, j : j + width : stride]
            for i in range(3)
            for j in range(3)
        ]


class ChannelFirst(Convolution):
    """XLA's convolution in the layout that PyTorch uses, between transpositions."""

    def convolve(self, x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
        x = jax.lax.conv_general_dilated(
            x.transpose(0, 3, 1, 2),
            kernel.transpose(3, 2, 0, 1),
            (stride, stride),
            [(1, 1), (1, 1)],
        )
        return x.transpose(0, 2, 3, 1)


class Im2Col(Convolution):
    """One matrix product with the nine shifted inputs side by side."""

    def convolve(self, x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
        columns = jnp.concatenate(self.shifted(x, stride), axis=-1)
        return columns @ kernel.reshape(-1, self.features)


class NineProducts(Convolution):
    """The sum of nine matrix products, so that the columns are never stored."""

    def convolve(self, x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
        products = zip(self.shifted(x, stride), kernel.reshape(9, -1, self.features), strict=True)
        return sum(columns @ matrix for columns, matrix in products)


VARIANTS = {
    "XLA's convolution, NHWC": nn.Conv,
    "XLA's convolution, NCHW": ChannelFirst,
    "im2col product": Im2Col,
    "nine products": NineProducts,
}


def loops_of(variant: type[nn.Module]) -> dict[str, timing.Loop]:
    problem = models_flax.resnet20(conv=variant)
    arguments = problem.params, problem.inputs, problem.targets, problem.statistics
    one_pass = curvax.value_grad_and_hessian_diag(problem.loss, has_aux=True)
    functions = {
        "gradient": jax.jit(jax.value_and_grad(problem.loss, has_aux=True)),
        "one pass": jax.jit(functools.partial(one_pass, key=jax.random.key(0))),
    }

    def loop_of(function):
        def loop(steps: int) -> None:
            for _ in range(steps):
                jax.block_until_ready(function(*arguments))

        return loop

    return {name: loop_of(function) for name, function in functions.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--only", default="", help="regular expression of convolutions to keep")
    args = parser.parse_args()
    variants = {name: conv for name, conv in VARIANTS.items() if re.search(args.only, name)}
    loops = {
        (variant, kind): loop
        for variant, module in variants.items()
        for kind, loop in loops_of(module).items()
    }
    rows = timing.time_loops(loops, seconds=args.seconds, cycle=2, blocks=args.blocks)
    print(f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')}\n")
    print("| convolution | gradient, ms | one pass, ms | ratio |\n| --- | ---: | ---: | ---: |")
    for variant in variants:
        gradient, one_pass = (1e3 * rows[variant, k]["median_s"] for k in ("gradient", "one pass"))
        print(f"| {variant} | {gradient:.1f} | {one_pass:.1f} | {one_pass / gradient:.2f} |")


if __name__ == "__main__":
    main()
