"""A module that stands for `vllm`, around a tiny model: vLLM in the process of the trainer."""

import types
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf.rollouts import LocalEngine, Sampling


@dataclass
class SamplingParams:
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    min_tokens: int
    max_tokens: int
    stop: list
    stop_token_ids: list
    seed: int
    logprobs: int
    detokenize: bool


class LLM:
    def __init__(self, folder, **options):
        self.options, self.calls = options, []
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        self.engine = LocalEngine(model, AutoTokenizer.from_pretrained(folder))
        self.asleep = set()
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: self.calls.append("shutdown")))

    def generate(self, prompts, parameters, use_tqdm):
        assert not self.asleep and not use_tqdm
        return [self._complete(*one) for one in zip(prompts, parameters, strict=True)]

    def _complete(self, prompt, given):
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_tokens", "max_tokens")
        sampling = Sampling(stop=tuple(given.stop), **{name: getattr(given, name) for name in names})
        if given.stop_token_ids:
            self.engine.end_ids = given.stop_token_ids
        ((one,),) = self.engine.generate([prompt["prompt_token_ids"]], 1, sampling, given.seed)
        logps = [{token: SimpleNamespace(logprob=logp)} for token, logp in zip(one.ids, one.logps, strict=True)]
        output = SimpleNamespace(token_ids=one.ids, logprobs=logps, finish_reason=one.finish_reason)
        return SimpleNamespace(outputs=[output])

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights" and "weights" not in self.asleep
        self.calls.append(method)
        self.engine.model.load_state_dict(dict(kwargs["weights_iterator"]))

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")

    def sleep(self, level):
        assert level == 2
        self.asleep = {"weights", "kv_cache"}
        with torch.no_grad():
            for weight in self.engine.model.parameters():
                weight.zero_()

    def wake_up(self, tags):
        self.asleep -= set(tags)


def module():
    one = types.ModuleType("vllm")
    one.LLM, one.SamplingParams = LLM, SamplingParams
    return one
