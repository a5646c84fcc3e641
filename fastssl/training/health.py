"""The watch over a run: cheap signs, read from numbers that are logged anyway, that training is going wrong.

One DINO run in the field sat at ln 65536 for 160 epochs unseen; the watch says so after a few hundred steps.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from fastssl.config import Health

WINDOW = 200  # gradient norms that make the running median


class HealthWatch:
    """Reads every step's scalars and returns a line for each thing that has gone wrong, once per occurrence.

    Args:
        config: thresholds.
        chance_loss: the loss of an output that is the same for every image (ln K for DINO), if there is one.
        first_step: the watch judges collapse only from this step on (the end of the first epoch).
    """

    def __init__(self, config: Health, chance_loss: float | None, first_step: int) -> None:
        self.config = config
        self.chance_loss = chance_loss
        self.first_step = first_step
        self.since: dict[str, int] = {}  # sign -> first step of its present uninterrupted stretch
        self.reported: list[str] = []  # signs already reported in their present stretch
        self.norms: deque[float] = deque(maxlen=WINDOW)

    def observe(self, step: int, scalars: dict[str, float]) -> list[str]:
        """Looks at one step.

        Args:
            step: the optimizer step.
            scalars: by name; reads loss, teacher_entropy (fraction of ln K), feature_std, grad_norm, data_wait; each
                is optional.

        Returns:
            One line per new finding.
        """
        if self.config.action == "off":
            return []
        findings = []
        if step >= self.first_step:
            findings += [line for line in self._collapse(step, scalars) if line]
        if "data_wait" in scalars:
            share = scalars["data_wait"]
            line = f"the GPU or CPU waits for data {share:.0%} of the time; raise data.workers or use a faster engine"
            findings += [self._lasting("data_wait", step, share > self.config.data_wait, line) or ""]
        norm = scalars.get("grad_norm")
        if norm is not None:
            line = "every step is left out, for its gradients are not finite; use run.precision=bf16 or fp32"
            findings.append(self._lasting("skipped", step, not math.isfinite(norm), line) or "")
        findings.append(self._spike(step, norm) or "")
        return [line for line in findings if line]

    def _collapse(self, step: int, scalars: dict[str, float]) -> list[str | None]:
        c, findings = self.config, []
        if self.chance_loss is not None and "loss" in scalars:
            pinned = abs(scalars["loss"] - self.chance_loss) <= c.chance_margin * self.chance_loss
            line = f"the loss is pinned at {self.chance_loss:.3f}, its value when every image gets the same output"
            findings.append(self._lasting("pinned", step, pinned, line))
        if "teacher_entropy" in scalars:
            entropy = scalars["teacher_entropy"]
            line = f"the teacher's entropy is {entropy:.3f} of ln K: it gives every image the same class"
            findings.append(self._lasting("one_class", step, entropy < c.entropy_margin, line))
            line = f"the teacher's entropy is {entropy:.3f} of ln K: its output is uniform and teaches nothing"
            findings.append(self._lasting("uniform", step, entropy > 1 - c.entropy_margin, line))
        if "feature_std" in scalars:
            spread = scalars["feature_std"]
            line = f"features have collapsed: their spread over the batch is {spread:.4f} (1 = as spread as can be)"
            findings.append(self._lasting("features", step, spread < c.feature_std, line))
        return findings

    def _lasting(self, sign: str, step: int, present: bool, line: str) -> str | None:
        """`line`, once, when `sign` has been present without a break for `patience` steps."""
        if not present:
            self.since.pop(sign, None)
            if sign in self.reported:
                self.reported.remove(sign)
            return None
        begin = self.since.setdefault(sign, step)
        if sign in self.reported or step - begin + 1 < self.config.patience:
            return None
        self.reported.append(sign)
        return f"step {step}: {line}, since step {begin}"

    def _spike(self, step: int, norm: float | None) -> str | None:
        if norm is None or not math.isfinite(norm):
            return None
        line = None
        if len(self.norms) >= WINDOW // 4:
            usual = median(self.norms)
            if norm > self.config.grad_spike * usual > 0:
                line = f"step {step}: gradient norm {norm:.3g} is {norm / usual:.0f} times its usual {usual:.3g}"
        self.norms.append(norm)
        return line

    def state_dict(self) -> dict:
        """Plain values from which `load_state_dict` continues the watch after a resume."""
        return {"since": dict(self.since), "reported": list(self.reported), "norms": list(self.norms)}

    def load_state_dict(self, state: dict) -> None:
        self.since, self.reported = dict(state["since"]), list(state["reported"])
        self.norms = deque(state["norms"], maxlen=WINDOW)
