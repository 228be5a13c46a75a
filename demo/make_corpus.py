"""How ``demo/data`` and ``demo/model`` came to be: a small world of questions, and a tokenizer trained on it.

    python demo/make_corpus.py

Every fact is asked in several ways. One way of asking in seven is held out, never a fact, so that a model that has
learnt the facts can answer the held-out rows. Fine-tuning rows answer now in a word, now in a sentence, always rightly.
Preference rows prefer the sentence to the single word, and the right sentence to a wrong one.
"""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent

# For each subject: the ways to ask, the sentence that answers, and pairs of a thing and its answer.
WORLD = {
    "colour": (
        ["What colour is {}?", "Which colour does {} have?", "Tell me the colour of {}.", "Do you know the colour of {}?"],
        "The colour of {} is {}.",
        "a lemon:yellow, grass:green, snow:white, coal:black, a tomato:red, the sky:blue, a carrot:orange, "
        "chocolate:brown, a plum:purple, a flamingo:pink, milk:white, an emerald:green, a ruby:red, a raven:black, "
        "the sea:blue, a sunflower:yellow, an elephant:grey, a strawberry:red, a frog:green, a canary:yellow",
    ),
    "sound": (
        ["What does {} do when it is loud?", "What sound comes from {}?", "How does {} sound?", "What do you hear from {}?"],
        "You can hear that {} {}.",
        "a dog:barks, a cat:meows, a cow:moos, a lion:roars, a duck:quacks, a sheep:bleats, a wolf:howls, a bee:buzzes, "
        "a snake:hisses, an owl:hoots, a horse:neighs, a mouse:squeaks, a clock:ticks, a bell:rings, a rooster:crows",
    ),
    "home": (
        ["Where does {} live?", "What is the home of {}?", "Where can I find {}?", "Where would {} sleep?"],
        "You will find {} in {}.",
        "a fish:the water, a bird:a nest, a bee:a hive, a bear:a cave, a horse:a stable, a spider:a web, a rabbit:a burrow, "
        "a king:a castle, a camel:the desert, a monkey:the trees, a sailor:a ship, a monk:a monastery, a pig:a sty, "
        "a dog:a kennel, a penguin:the ice",
    ),
    "opposite": (
        ["What is the opposite of {}?", "Which word means the reverse of {}?", "Give me the opposite of {}.", "If it is not {}, what is it?"],
        "The opposite of {} is {}.",
        "hot:cold, big:small, fast:slow, up:down, day:night, wet:dry, old:young, hard:soft, loud:quiet, open:closed, "
        "full:empty, rich:poor, light:dark, early:late, happy:sad, strong:weak, near:far, sweet:bitter, long:short, "
        "clean:dirty, sharp:blunt, deep:shallow, thick:thin, true:false, first:last",
    ),
    "capital": (
        ["What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}.", "Where does the government of {} sit?"],
        "The capital of {} is {}.",
        "France:Paris, Spain:Madrid, Italy:Rome, Japan:Tokyo, Egypt:Cairo, Norway:Oslo, Greece:Athens, Cuba:Havana, "
        "Kenya:Nairobi, Peru:Lima, Austria:Vienna, Ireland:Dublin, Portugal:Lisbon, Poland:Warsaw, Canada:Ottawa, "
        "Chile:Santiago, Finland:Helsinki, Hungary:Budapest, Vietnam:Hanoi, Iran:Tehran",
    ),
    "legs": (
        ["How many legs does {} have?", "On how many legs does {} stand?", "Count the legs of {}.", "What number of legs has {}?"],
        "The number of legs of {} is {}.",
        "a dog:four, a bird:two, a spider:eight, an ant:six, a snake:zero, a table:four, a tripod:three, a crab:ten, "
        "a bee:six, a horse:four, a scorpion:eight, a chicken:two, a fish:zero, a beetle:six, a stool:three",
    ),
    "tool": (
        ["What do I need to {}?", "Which tool helps me to {}?", "I want to {}. What should I take?", "What is used to {}?"],
        "In order to {} you need {}.",
        "cut paper:scissors, drive a nail:a hammer, dig a hole:a shovel, sweep the floor:a broom, write a letter:a pen, "
        "open a lock:a key, eat soup:a spoon, paint a wall:a brush, sew a button:a needle, light a candle:a match, "
        "tell the time:a clock, fell a tree:an axe, boil water:a kettle, climb a wall:a ladder, see the stars:a telescope",
    ),
}  # fmt: skip

TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


def rows(rng: random.Random) -> dict[str, list[dict]]:
    """The four files, by name."""
    files: dict[str, list[dict]] = {"sft_train": [], "sft_eval": [], "pairs_train": [], "pairs_eval": []}
    number = 0
    for questions, sentence, listed in WORLD.values():
        facts = [tuple(entry.strip().split(":")) for entry in listed.split(",")]
        for thing, answer in facts:
            wrong = sorted({other for _, other in facts} - {answer})
            for question in questions:
                part = "eval" if number % 7 == 3 else "train"
                number += 1
                prompt = [{"role": "user", "content": question.format(thing)}]
                full, word = sentence.format(thing, answer), answer.capitalize() + "."
                for text in (full, word) if part == "train" else (full,):
                    files[f"sft_{part}"].append({"messages": [*prompt, {"role": "assistant", "content": text}]})
                worse = word if rng.random() < 0.6 else sentence.format(thing, rng.choice(wrong))
                files[f"pairs_{part}"].append(
                    {
                        "prompt": prompt,
                        "chosen": [{"role": "assistant", "content": full}],
                        "rejected": [{"role": "assistant", "content": worse}],
                    }
                )
    for listed_rows in files.values():
        rng.shuffle(listed_rows)
    return files


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=768, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


def main() -> None:
    files = rows(random.Random(0))
    for name, listed in files.items():
        text = "".join(json.dumps(row) + "\n" for row in listed)
        (HERE / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(name, len(listed), "rows")
    train = [turn["content"] for row in files["sft_train"] for turn in row["messages"]]
    fast = tokenizer([*train, "### user\n### assistant\n"])
    fast.save_pretrained(HERE / "model")
    LlamaConfig(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(HERE / "model")


if __name__ == "__main__":
    main()
