"""Use every row of the bank as a negative: the exact loss over the whole bank."""

from typing_extensions import override

from memory_bank.bank import Bank
from memory_bank.config import MiningConfig
from memory_bank.methods.base import Answer, Asked, LookUp, MiningMethod, with_fresh_batch
from memory_bank.negatives import log_mask


class AllRows(MiningMethod):
    """Use every admissible row once; the batch's fresh keys stand for their own stale slots."""

    gathers_every_row = True
    reads = frozenset()

    @override
    def depth(self, config: MiningConfig, rows: int) -> int:
        return 0

    @override
    def negatives(self, asked: Asked, bank: Bank, look_up: LookUp, config: MiningConfig) -> Answer:
        rest = bank.without(bank.admissible(asked.step), asked.batch_ids)
        keys, ids, rest = bank.every_row(rest)
        excluded = ~rest[None] | (ids[None] == asked.ids[:, None])
        return Answer(with_fresh_batch(asked, keys, ids, log_mask(excluded)))
