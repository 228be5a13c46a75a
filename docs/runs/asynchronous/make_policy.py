"""The policy of the run: a model of 4.7 million parameters, trained for a short time on the corpus of the demo."""

import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from rlhf.cli.main import main

OUT = Path("runs/asynchronous")

set_seed(0)
config = AutoConfig.from_pretrained(
    "demo/model", hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=4,
)  # fmt: skip
AutoModelForCausalLM.from_config(config).save_pretrained(OUT / "base")
AutoTokenizer.from_pretrained("demo/model").save_pretrained(OUT / "base")
options = (
    f"--model_name_or_path {OUT / 'base'} --dataset_name demo/data/sft_train.jsonl --output_dir {OUT / 'policy'} "
    "--chat_template_path demo/model --max_length 128 --per_device_train_batch_size 32 --learning_rate 2e-3 "
    "--warmup_steps 10 --max_steps 120 --logging_steps 20 --save_strategy no --report_to none --use_cpu --overwrite"
)
sys.exit(main(["sft", *options.split()]))
