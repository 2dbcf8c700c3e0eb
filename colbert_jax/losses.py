"""The two losses of the recipe, each from scores to one number. Q queries, N or C documents."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def contrastive_loss(
    scores: Float[Array, "Q N"],
    positives: Int[Array, "Q"],
    temperature: float | Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """InfoNCE (arXiv 1807.03748): cross-entropy of each query's own document against all others.

    Args:
      scores: `scores[query, document]`, in-batch and mined negatives side by side.
      positives: `positives[query]`, the column of each query's own document.
      temperature: scores are divided by it; a fixed number or a learned scalar.

    Returns:
      The mean loss over queries (nats) and the in-batch accuracy: the share of queries whose own
      document scores highest. Both float32. Equal to PyLate's `Contrastive`.
    """
    logits = scores.astype(jnp.float32) / temperature
    own = jnp.take_along_axis(logits, positives[:, None], axis=1)[:, 0]
    loss = jnp.mean(jax.nn.logsumexp(logits, axis=1) - own)
    accuracy = jnp.mean((jnp.argmax(logits, axis=1) == positives).astype(jnp.float32))
    return loss, accuracy


def distillation_loss(
    scores: Float[Array, "Q C"],
    teacher_scores: Float[Array, "Q C"],
    normalize: bool = True,
    epsilon: float = 1e-8,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """KL(teacher, student) over each query's candidates.

    Args:
      scores: the student's `scores[query, candidate]`.
      teacher_scores: the teacher's, as logits.
      normalize: whether the student's scores are first brought to [0, 1] by each query's own
        minimum and maximum, as the recipe has it.
      epsilon: added to the range, so that equal scores do not divide by zero.

    Returns:
      The mean divergence over queries (nats) and the share of queries whose best candidate is
      the teacher's too. Both float32. Equal to PyLate's `Distillation`.
    """
    student = scores.astype(jnp.float32)
    if normalize:
        low = student.min(axis=1, keepdims=True)
        high = student.max(axis=1, keepdims=True)
        student = (student - low) / (high - low + epsilon)
    student = jax.nn.log_softmax(student, axis=1)
    teacher = jax.nn.log_softmax(teacher_scores.astype(jnp.float32), axis=1)
    loss = jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), axis=1))
    agree = jnp.argmax(student, axis=1) == jnp.argmax(teacher, axis=1)
    return loss, jnp.mean(agree.astype(jnp.float32))
