"""The life of a block: its states, its geometry, the ledger that every process of a region shares, and budgets.

Nothing here makes a fault go away; that is the pager's business.
This package says what a block is and where the truth about it is written down.
"""

from __future__ import annotations

from userfault.blocks.states import TRANSITIONS, BlockState, Transition

__all__ = ["TRANSITIONS", "BlockState", "Transition"]
