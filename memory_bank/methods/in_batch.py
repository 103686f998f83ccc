"""Use only the batch's keys as negatives: MoCo v3; all others until the bank is filled to ``min_fill``."""

from typing_extensions import override

from memory_bank.bank import Bank
from memory_bank.config import MiningConfig
from memory_bank.methods.base import LookUp, Mined, MiningBatch, MiningMethod
from memory_bank.negatives import Negatives, log_mask


class InBatch(MiningMethod):
    """Use the other keys of the batch as negatives of every query."""

    reads = frozenset()
    uses_bank = False

    @override
    def depth(self, config: MiningConfig, rows: int) -> int:
        return 0

    @override
    def negatives(self, batch: MiningBatch, bank: Bank, look_up: LookUp, config: MiningConfig) -> Mined:
        log_weight = log_mask(batch.own_in_batch)
        return Mined(Negatives.none(batch.query).with_shared(batch.batch_keys, batch.batch_ids, log_weight))
