"""Kernel alignment and neural collapse against their definitions, written plainly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import spectrum

GENERATOR = np.random.default_rng(0)


def gram(rows):
    return rows @ rows.T


class TestAlignment:
    def test_centered_it_is_the_correlation_of_centered_matrices(self):
        first, second = (gram(GENERATOR.normal(size=(6, 3)) + 2) for _ in range(2))
        center = np.eye(6) - np.full((6, 6), 1 / 6)
        k, m = center @ first @ center, center @ second @ center
        expected = np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))
        np.testing.assert_allclose(spectrum.kernel_alignment(first, second), expected, rtol=1e-12)

    def test_plain_it_is_the_cosine(self):
        first, second = (gram(GENERATOR.normal(size=(5, 2))) for _ in range(2))
        expected = (first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second)
        found = spectrum.kernel_alignment(first, second, centered=False)
        np.testing.assert_allclose(found, expected, rtol=1e-12)

    @pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
    def test_scale_does_not_matter(self, scale):
        matrix = gram(GENERATOR.normal(size=(5, 2)))
        np.testing.assert_allclose(spectrum.kernel_alignment(scale * matrix, matrix), 1, rtol=1e-9)

    def test_a_linear_networks_kernel_is_aligned_with_what_it_can_learn(self):
        inputs = jax.random.normal(jax.random.key(0), (8, 3))
        kernel = spectrum.ntk_gram(lambda w, x: x @ w, jnp.zeros((3, 1)), inputs)
        np.testing.assert_allclose(
            spectrum.kernel_alignment(kernel, inputs @ inputs.T), 1, rtol=1e-5
        )

    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            (np.eye(3), np.eye(2), "square and of the same shape"),
            (np.ones((3, 2)), np.ones((3, 2)), "square and of the same shape"),
            (np.eye(3), np.ones((3, 3)), "is zero .after centering"),
            (np.eye(3), np.full((3, 3), np.nan), "must be finite"),
        ],
    )
    def test_what_has_no_angle_is_refused(self, first, second, message):
        with pytest.raises(ValueError, match=message):
            spectrum.kernel_alignment(first, second)


def simplex(num_classes, size):
    """The corners of a simplex around zero, turned in a larger space."""
    corners = np.eye(num_classes) - 1 / num_classes
    turned = np.linalg.qr(GENERATOR.normal(size=(size, num_classes)))[0]
    return corners @ turned.T


class TestCollapse:
    labels = np.repeat(np.arange(4), [3, 5, 2, 4])  # unbalanced

    def test_it_is_the_published_definition(self):
        features = GENERATOR.normal(size=(14, 6)) + 3 * simplex(4, 6)[self.labels]
        kernel, bias = GENERATOR.normal(size=(6, 4)), GENERATOR.normal(size=4)
        means = np.stack([features[self.labels == c].mean(axis=0) for c in range(4)])
        centered = means - means.mean(axis=0)
        differences = features - means[self.labels]
        within = sum(np.outer(d, d) for d in differences) / 14
        between = sum(np.outer(m, m) for m in centered) / 4
        lengths = np.linalg.norm(centered, axis=1)
        angles = [
            abs(centered[i] @ centered[j] / lengths[i] / lengths[j] + 1 / 3)
            for i in range(4)
            for j in range(i)
        ]
        duality = kernel.T / np.linalg.norm(kernel) - centered / np.linalg.norm(centered)
        nearest = [np.argmin(np.linalg.norm(h - means, axis=1)) for h in features]
        decided = np.argmax(features @ kernel + bias, axis=1)
        expected = spectrum.NeuralCollapse(
            np.trace(within @ np.linalg.pinv(between)) / 4,
            lengths.std() / lengths.mean(),
            np.mean(angles),
            np.sum(duality**2),
            np.mean(decided != nearest),
        )
        found = spectrum.neural_collapse(features, self.labels, kernel, bias)
        np.testing.assert_allclose(found, expected, rtol=1e-9)

    def test_collapsed_features_measure_zero(self):
        corners = simplex(4, 6)
        features = 3 * corners[self.labels] + GENERATOR.normal(size=6)
        kernel, bias = corners.T, -corners @ features.mean(axis=0)
        found = spectrum.neural_collapse(features, self.labels, kernel, bias)
        np.testing.assert_allclose(found[:4], 0, atol=1e-9)

    def test_without_a_classifier_it_measures_features_alone(self):
        found = spectrum.neural_collapse(GENERATOR.normal(size=(14, 6)), self.labels + 10)
        assert np.isfinite(found[:3]).all()
        assert np.isnan(found[3:]).all()

    @pytest.mark.parametrize(
        ("features", "labels", "kernel", "message"),
        [
            (np.ones((4, 2)), np.zeros(4, int), None, "at least two classes"),
            (np.ones((4, 2)), np.zeros(3, int), None, r"of shape \(N, d\)"),
            (np.ones((4, 2)), np.array([0.0, 0, 1, 1]), None, "integers"),
            (np.ones((4, 2)), np.array([0, 0, 1, 1]), None, "angles are undefined"),
            (np.full((4, 2), np.inf), np.array([0, 0, 1, 1]), None, "must be finite"),
            (np.eye(4), np.array([0, 0, 2, 2]), np.ones((4, 3)), "all classes must occur"),
            (np.eye(4), np.array([0, 0, 1, 1]), np.ones((2, 4)), "Equinox's weight"),
        ],
    )
    def test_what_cannot_be_measured_is_refused(self, features, labels, kernel, message):
        with pytest.raises(ValueError, match=message):
            spectrum.neural_collapse(features, labels, kernel)
