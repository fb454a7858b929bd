"""One pass of a model, whatever its phase: how many tokens enter, and how many are cached.

Source: survey (arXiv 2402.16363), section 2.1; speculative verification, arXiv 2211.17192.

Chapter: one forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from rooflm.roofline.numeric import Number, is_array, size


@dataclass(frozen=True)
class ForwardPass:
    """One pass of the model over `new_tokens` per sequence, with a cache before them.

    Parameters
    ----------
    batch : sequences processed together.
    new_tokens : tokens per sequence that enter this pass.
    cached_tokens : tokens per sequence already in the KV cache.
    logits : positions per sequence that reach the LM head: 1, all n in verification, 0 for a
        chunk that is not the last.

    Sizes are whole numbers, or arrays of them (a sweep), or symbols (a formula).

    >>> ForwardPass.decode(batch=1, context=2048)
    ForwardPass(batch=1, new_tokens=1, cached_tokens=2047, logits=1)
    """

    batch: Number
    new_tokens: Number
    cached_tokens: Number = 0
    logits: Number = 1

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "batch", size("batch", self.batch))
        put(self, "new_tokens", size("new_tokens", self.new_tokens))
        put(self, "cached_tokens", size("cached_tokens", self.cached_tokens, smallest=0))
        put(self, "logits", size("logits", self.logits, smallest=0))
        if is_array(self.logits) and not self.logits.all():
            raise ValueError("logits holds a 0; allowed: 0 for all passes, or at least 1 for each")
        if self.logits is not self.new_tokens:
            too_many = self.logits > self.new_tokens
            if too_many is True or (is_array(too_many) and too_many.any()):
                raise ValueError(
                    f"logits is {self.logits}; allowed: at most new_tokens ({self.new_tokens})"
                )

    @classmethod
    def prefill(cls, batch: Number, prompt_tokens: Number) -> ForwardPass:
        """The whole prompt at once, from an empty cache."""
        return cls(batch, size("prompt_tokens", prompt_tokens))

    @classmethod
    def decode(cls, batch: Number, context: Number) -> ForwardPass:
        """One new token; `context` counts it, so the cache holds context - 1."""
        return cls(batch, 1, size("context", context) - 1)

    @classmethod
    def verify(cls, batch: Number, draft_tokens: Number, context: Number) -> ForwardPass:
        """The last accepted token and `draft_tokens` drafts, all of them scored.

        `context` counts them, so the cache holds context - draft_tokens - 1
        (arXiv 2211.17192, algorithm 1).
        """
        new = size("draft_tokens", draft_tokens, smallest=0) + 1
        cached = size("context", context) - new
        short = cached < 0
        if short is True or (is_array(short) and short.any()):
            raise ValueError(f"context is {context}; allowed: at least draft_tokens + 1 ({new})")
        return cls(batch, new, cached, new)

    @property
    def context(self) -> Number:
        """Tokens per sequence once the pass is done."""
        return self.cached_tokens + self.new_tokens

    @property
    def tokens(self) -> Number:
        """t = b n, the rows of every linear layer's input."""
        return self.batch * self.new_tokens
