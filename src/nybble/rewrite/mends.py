"""What `repair` can mend, in the order in which it is done.

A mend looks at the draft itself: it finds the fault again and changes as little as takes it away.
Nothing is requantized: codes stay, but for a sign that moves from a scale to its codes.
"""

from __future__ import annotations

from nybble.rewrite import mend_configuration, mend_parts, mend_scales
from nybble.rewrite.mend import Step

#: Names and what is there first, then scales, then what the configuration says of all that.
STEPS: tuple[Step, ...] = (
    *mend_parts.STEPS,
    *mend_scales.STEPS,
    *mend_configuration.STEPS,
)
