"""A frozen reference, without a trainer: whose log-probs it gives, and how it follows the policy."""

from types import SimpleNamespace

import pytest
import torch
from conftest import close, tiny_model
from peft import LoraConfig, get_peft_model

from rlhf.data import Collator
from rlhf.models import Policy
from rlhf.trainers.reference import Reference, ReferenceSyncArguments, SyncReference

ROWS = [{"prompt_ids": [5, 6], "completions": [[7, 8, 9]], "labels": [[7, 8, 9]]}]


def test_a_model_of_its_own_is_asked():
    policy, frozen = Policy(tiny_model(seed=1)), Policy(tiny_model())
    batch = Collator(0)(ROWS)
    close(Reference(policy, frozen).logps(policy, batch), frozen(batch).logps)


def test_the_adapter_is_off_meanwhile():
    base = Policy(tiny_model())
    policy = Policy(get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)))
    batch = Collator(0)(ROWS)
    before = policy(batch).logps
    assert not torch.allclose(before, base(batch).logps)
    close(Reference(policy, None).logps(policy, batch), base(batch).logps)
    close(policy(batch).logps, before)


def test_it_follows_the_policy_at_its_steps():
    frozen, policy = Policy(tiny_model().requires_grad_(False)), Policy(tiny_model(seed=1))
    start = [parameter.clone() for parameter in frozen.parameters()]
    sync = SyncReference(frozen, ReferenceSyncArguments(ref_model_mixup_alpha=0.25, ref_model_sync_steps=2), False)
    sync.on_step_end(None, SimpleNamespace(global_step=1), None, model=policy)
    assert all(map(torch.equal, frozen.parameters(), start))
    sync.on_step_end(None, SimpleNamespace(global_step=2), None, model=policy)
    for now, before, trained in zip(frozen.parameters(), start, policy.parameters(), strict=True):
        close(now, 0.75 * before + 0.25 * trained)


@pytest.mark.parametrize(
    ("frozen", "is_sharded", "message"), [(None, False, "moves a copy"), ("policy", True, "sharded")]
)
def test_what_cannot_follow_is_refused(frozen, is_sharded, message):
    reference = frozen and Policy(tiny_model())
    with pytest.raises(ValueError, match=message):
        SyncReference(reference, ReferenceSyncArguments(), is_sharded)
