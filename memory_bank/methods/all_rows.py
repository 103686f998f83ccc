"""Use every row of the bank as a negative: the exact loss over the whole bank."""

from typing_extensions import override

from memory_bank.bank import Bank
from memory_bank.config import MiningConfig
from memory_bank.methods.base import LookUp, Mined, MiningBatch, MiningMethod, with_fresh_batch
from memory_bank.negatives import log_mask


class AllRows(MiningMethod):
    """Use every admissible row once; the batch's fresh keys stand for their own stale slots."""

    gathers_every_row = True
    reads = frozenset()

    @override
    def depth(self, config: MiningConfig, rows: int) -> int:
        return 0

    @override
    def negatives(self, batch: MiningBatch, bank: Bank, look_up: LookUp, config: MiningConfig) -> Mined:
        rest = bank.without(bank.admissible(batch.step), batch.batch_ids)
        keys, ids, rest = bank.every_row(rest)
        excluded = ~rest[None] | (ids[None] == batch.ids[:, None])
        return Mined(with_fresh_batch(batch, keys, ids, log_mask(excluded)))
