"""A tiny model of every family of causal LMs in transformers, and how a run on it compares with a plain loop.

``PYTHONPATH=tests python -m world.families`` prints the table of ``docs/models.md``; names after it choose families.
"""

import copy
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from rlhf.logprobs import verified_settings
from rlhf.rollouts import LocalEngine, Sampling

VOCABULARY = 330
_WIDTH, _DEPTH, _HEADS, _POSITIONS = 32, 2, 4, 128
# The names that configs have for the same few sizes.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "projection_dim"), _WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "attention_hidden_size", "lru_width", "head_dim_total"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "n_inner", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "mlp_hidden_size", "shared_intermediate_size", "feed_forward_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size", "block_ff_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), _DEPTH),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), _DEPTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), _POSITIONS),
    **dict.fromkeys(("max_source_positions", "n_ctx", "max_sequence_length", "max_length"), _POSITIONS),
    **dict.fromkeys(("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts", "n_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "attention_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "global_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("sliding_window", "local_window_size", "attention_window_size", "window_size"), 8),
}  # fmt: skip
# What the sizes alone do not settle.
_MLA = dict(num_key_value_heads=4, head_dim=4, qk_rope_head_dim=4)
_HYBRID = dict(layer_types=["linear_attention", "full_attention"])
_GEMMA4: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    vocab_size=VOCABULARY, sliding_window=8, layer_types=["sliding_attention", "full_attention"], global_head_dim=8,
    vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8, num_kv_shared_layers=0,
)  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "bamba": dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, attn_layer_indices=[1]),
    "cohere_compass_text": dict(layer_types=["full_attention"] * 2),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v2": _MLA | dict(num_experts_per_tok=2),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    "gemma3n_text": dict(num_kv_shared_layers=0, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(
        mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, layer_types=["linear_attention", "full_attention"]
    ),
    "falcon_h1": dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "lfm3": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(num_heads=4, head_dim=16, n_groups=1, expand=2),
    "nemotron": dict(num_key_value_heads=4, head_dim=8),
    "prophetnet": dict(num_hidden_layers=None),
    "qwen4_exp_text": dict(layer_types=["linear_attention", "indexed_attention"]),
    "recurrent_gemma": dict(block_types=("recurrent", "attention")),
    "reformer": dict(is_decoder=True, axial_pos_embds_dim=(16, 16), axial_pos_shape=(8, 16)),
    "rembert": dict(input_embedding_size=32, output_embedding_size=32),
    "roc_bert": dict(pronunciation_vocab_size=50, shape_vocab_size=50, pronunciation_embed_dim=8, shape_embed_dim=8),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(
        num_hidden_layers=6,
        layers_block_type=["mamba", "mamba", "hybrid"] * 2,
        attention_hidden_size=64,
        attention_head_dim=16,
    ),
    "zamba2": dict(
        num_hidden_layers=6,
        layers_block_type=["mamba", "mamba", "hybrid"] * 2,
        attention_hidden_size=64,
        attention_head_dim=16,
        mamba_ngroups=1,
        n_mamba_heads=4,
    ),
    "zaya": dict(num_experts_per_tok=1),
}
for _names, _changes in (
    (("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash"), _MLA),
    (("minicpm3", "youtu"), _MLA),
    (("bailing_hybrid", "kimi_linear"), _MLA | _HYBRID),
    (("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), _HYBRID),
    (("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), dict(head_dim=8)),
    (("qwen3_5", "qwen3_5_moe"), dict(text_config=_HYBRID)),
    (("gemma4_text", "gemma4_unified_text"), _GEMMA4),
    (("gemma4", "gemma4_unified"), dict(text_config=_GEMMA4, audio_config=None)),
):
    _OWN |= dict.fromkeys(_names, _changes)


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    try:
        usual = AutoConfig.for_model(family)
    except ValueError:  # no defaults that fit together
        usual = CONFIG_MAPPING[family]()
    given = _small(usual)
    for name, value in (_OWN.get(family, {}) | changes).items():
        part = given.get(name)
        given[name] = part | value if isinstance(part, dict) and isinstance(value, dict) else value
    return AutoConfig.for_model(family, **{name: value for name, value in given.items() if value is not None})


def _small(usual: PretrainedConfig) -> dict[str, Any]:
    """The sizes that ``usual`` has, and those of its parts."""
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=0, vocab_size=VOCABULARY)
    sizes = {**_SIZES, **ids, "is_decoder": True}
    given = {name: value for name, value in sizes.items() if isinstance(_read(usual, name), int)}
    parts = {
        name: part for name in usual.sub_configs if isinstance(part := getattr(usual, name, None), PretrainedConfig)
    }
    return {**ids, **given, **{name: _small(part) for name, part in parts.items()}}


def _read(config: PretrainedConfig, name: str) -> Any:
    """What can be read and set; a property without a setter follows from the rest."""
    own = getattr(type(config), name, None)
    if isinstance(own, property) and own.fset is None:
        return None
    try:
        return getattr(config, name, None)
    except Exception:  # differs by layer
        return None


def tiny_family(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()


# What is no language model by itself, or needs a package that is not here.
APART = {
    "blt": "reads bytes through parts of its own",
    "gemma3n": "needs timm",
    "gemma4_assistant": "a draft for another model",
    "gemma4_unified_assistant": "a draft for another model",
    "musicgen": "sound",
    "musicgen_melody": "sound",
    "moshi": "sound",
    "whisper": "sound",
    "trocr": "answers an image",
    "git": "answers an image",
    "fuyu": "answers an image",
    "got_ocr2": "answers an image",
    "moss_transcribe_diarize": "answers sound",
    "xlnet": "permutes its text",
    "xlm": "reads both ways",
    "reformer": "takes one length",
    "cohere_compass_text": "no small configuration yet",
    "dots3_note": "no small configuration yet",
    "dots3_note_text": "no small configuration yet",
}
# Where transformers or PEFT cannot do something, or this project not yet.
UNABLE = {
    "cpmant": "reads padding; a warning says so",
    "emu3": "its text part is saved as no causal LM",
    "laguna": "PEFT looks for the adapter of its shared experts under another name",
    "mllama": "its text part is saved as no causal LM",
    "phimoe": "draws its experts at random while it trains",
    "prophetnet": "up to 1.4e-3 from the plain loop",
    "qwen4_exp": "generate fails on its layers",
    "qwen4_exp_text": "no small configuration yet",
    "roc_bert": "changes the output of a layer with an adapter in place",
}
FAMILIES = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in APART]
RATE, BETA = 0.1, 0.5


class Found(NamedTuple):
    """How far runs are from a plain loop (relative), or why one could not be made; and the ways that a family takes."""

    sft: float | str
    dpo: float | str
    sampling: float | str
    lora: float | str
    reload: float | str
    layout: str
    head: str
    sampler: str

    COMPARED = ("sft", "dpo", "sampling", "lora", "reload")


def examine(family: str) -> Found:
    tokenizer = numbers()
    model = tiny_family(family)
    ways = dict(layout="?", head="own" if verified_settings(model) is None else "ours", sampler="?")

    def sft() -> float:
        trained, loss, ways["layout"] = _train_sft(model, tokenizer)
        want, moved = _plain(model, lambda m: -sum(_logps(m, row["input_ids"], 1).sum() for row in ROWS) / TOKENS)
        return max(abs(loss / want - 1), _apart(model, trained, moved))

    def dpo() -> float:
        args = DPOConfig(beta=BETA, **_args())
        trainer = DPOTrainer(copy.deepcopy(model), args=args, train_dataset=PAIRS, processing_class=tokenizer)
        trainer.train()
        with torch.no_grad():
            ref = [_pair(model, row) for row in PAIRS]
        _, moved = _plain(
            model,
            lambda m: (
                sum(-F.logsigmoid(BETA * (_pair(m, row) - r)) for row, r in zip(PAIRS, ref, strict=True)) / len(ref)
            ),
        )
        return _apart(model, trainer.model.model, moved)

    def sampling() -> float:
        prompts = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]
        engine = LocalEngine(copy.deepcopy(model), tokenizer)
        groups = engine.generate(prompts, 2, Sampling(max_tokens=6), 0)
        ways["sampler"] = "generate" if engine._fallback_reason else "ours"
        with torch.no_grad():
            return max(
                float((_logps(model, prompt + one.ids, len(prompt)) - torch.tensor(one.logps)).abs().max())
                for prompt, group in zip(prompts, groups, strict=True)
                for one in group
            )

    def lora() -> float:
        trained, _, _ = _train_sft(model, tokenizer, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            base = AutoModelForCausalLM.from_pretrained(folder).eval()
        with tempfile.TemporaryDirectory() as folder:
            trained.save_pretrained(folder)
            again = PeftModel.from_pretrained(base, folder).eval()
        return _logits_apart(trained, again)

    def reload() -> float:
        trained, _, _ = _train_sft(model, tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            trained.save_pretrained(folder)
            again = AutoModelForCausalLM.from_pretrained(folder).eval()
        return _logits_apart(trained, again)

    results = {run.__name__: _attempt(run) for run in (sft, dpo, sampling, lora, reload)}
    return Found(**results, **ways)


def numbers() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the ids."""
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="2"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="0")


def _rows() -> tuple[Dataset, Dataset]:
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 300, (n,), generator=g).tolist() for n in (12, 5, 9, 7)]
    pairs = [{"prompt_ids": ids[:4], "chosen_ids": ids[4:], "rejected_ids": ids[:2:-1]} for ids in texts]
    return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in texts]), Dataset.from_list(pairs)


ROWS, PAIRS = _rows()
TOKENS = sum(len(row["input_ids"]) - 1 for row in ROWS)


def _args() -> dict[str, Any]:
    return dict(
        output_dir=tempfile.mkdtemp(), max_steps=1, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True,
        optim="sgd", learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0, disable_tqdm=True,
        per_device_train_batch_size=4, disable_dropout=True, max_length=64,
    )  # fmt: skip


def _train_sft(model: Any, tokenizer: Any, peft_config: LoraConfig | None = None) -> tuple[Any, float, str]:
    trainer = SFTTrainer(
        copy.deepcopy(model), args=SFTConfig(**_args()), train_dataset=ROWS, processing_class=tokenizer,
        peft_config=peft_config,
    )  # fmt: skip
    trainer.train()
    return trainer.model.model.eval(), trainer.state.log_history[0]["loss"], trainer.data_collator.layout


def _logps(model: Any, ids: list[int], start: int) -> Tensor:
    """Of the tokens from ``start`` on, of one text by itself, as the model's own forward has them."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]
    return logits.float().log_softmax(-1)[torch.arange(len(ids) - start), ids[start:]]


def _pair(model: Any, row: dict[str, list[int]]) -> Tensor:
    prompt = row["prompt_ids"]
    chosen, rejected = (_logps(model, prompt + row[name], len(prompt)).sum() for name in ("chosen_ids", "rejected_ids"))
    return chosen - rejected


def _plain(model: Any, loss: Callable[[Any], Any]) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the weights after a step."""
    own = copy.deepcopy(model).eval()
    value = loss(own)
    value.backward()
    return float(value), {n: p.detach() - (0 if p.grad is None else RATE * p.grad) for n, p in own.named_parameters()}


def _apart(before: Any, trained: Any, moved: dict[str, Tensor]) -> float:
    """The largest difference between two steps, over the largest step."""
    own, old = dict(trained.named_parameters()), dict(before.named_parameters())
    largest = max(float((moved[name] - p).abs().max()) for name, p in old.items())
    return max(float((own[name] - p).abs().max()) for name, p in moved.items()) / largest


def _logits_apart(one: Any, other: Any) -> float:
    with torch.no_grad():
        left, right = (m(input_ids=torch.tensor([ROWS[0]["input_ids"]]), use_cache=False).logits for m in (one, other))
    return float((left - right).abs().max() / left.abs().max())


def _attempt(run: Callable[[], float]) -> float | str:
    try:
        return run()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def line(family: str, found: Found) -> str:
    """Of the table."""
    compared = [getattr(found, name) for name in Found.COMPARED]
    cells = [f"{value:.0e}" if isinstance(value, float) else "no" for value in compared]
    return f"| {' | '.join([family, found.layout, found.head, found.sampler, *cells])} |"


if __name__ == "__main__":
    print(f"| family | layout | head | sampler | {' | '.join(Found.COMPARED)} |")
    print("|---" * (4 + len(Found.COMPARED)) + "|")
    for name in sys.argv[1:] or FAMILIES:
        print(line(name, examine(name)), flush=True)
