"""Before the first step, on the run's own model and data: E8 (packs), E9 (fused kernels) and E10 (masks)."""

from launcher.audit.audit import Audit
from launcher.audit.finding import Checked, Finding

__all__ = ["Audit", "Checked", "Finding"]
