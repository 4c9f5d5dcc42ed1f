"""Builds the shipped tokenizer from the synthetic corpus: python scripts/build_tokenizer.py [--out DIR] [--vocab-size
N]

Every kind of text the small model reads or writes goes in: posts, questions, label sentences and explanations of all
tasks in both languages and both variants, and the reading exercises of pre-training. The same arguments give the same
bytes.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from mentalglm_jax.data.synthetic import SyntheticConfig, make_corpus, pretraining_chats
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import BUILTIN, train_bpe


def texts() -> Iterator[str]:
    for variant in ("faithful", "unfaithful"):
        config = SyntheticConfig(n_train=1500, n_dev=0, n_test=0, variant=variant)
        for record in make_corpus(config):
            yield record.prompt
            yield record.answer()
    for user, assistant, _ in pretraining_chats(SyntheticConfig(), 3000):
        yield user
        yield assistant
    for task in map(tasks.get_task, tasks.BUILT_IN):  # also the sets the synthetic corpus does not have
        for language in task.languages:
            yield from task.all_questions(language)
            yield from task.candidates(language).values()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BUILTIN, help="directory to write (default: the shipped one)")
    parser.add_argument("--vocab-size", type=int, default=2560, help="tokens in all, special ones included")
    arguments = parser.parse_args()
    tokenizer = train_bpe(texts(), arguments.vocab_size)
    tokenizer.save(arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{arguments.out}: {tokenizer.vocab_size} tokens, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
