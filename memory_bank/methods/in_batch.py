"""Use only the batch's keys as negatives: MoCo v3; all others until the bank is filled to ``min_fill``."""

from typing_extensions import override

from memory_bank.bank import Bank
from memory_bank.config import MiningConfig
from memory_bank.methods.base import Answer, Asked, LookUp, MiningMethod
from memory_bank.negatives import Negatives, log_mask


class InBatch(MiningMethod):
    """Use the other keys of the batch as negatives of every query."""

    reads = frozenset()
    uses_bank = False

    @override
    def depth(self, config: MiningConfig, rows: int) -> int:
        return 0

    @override
    def negatives(self, asked: Asked, bank: Bank, look_up: LookUp, config: MiningConfig) -> Answer:
        log_weight = log_mask(asked.own_in_batch)
        return Answer(Negatives.none(asked.query).with_shared(asked.batch_keys, asked.batch_ids, log_weight))
