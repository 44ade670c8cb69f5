"""What to do with an artifact: let it write, score a text of your own, export its weights."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import train_gpt as t
from record.log import RecordError


def new_parser(doc: str) -> argparse.ArgumentParser:
    """A command-line parser. Its help text is `doc`, the docstring of an example."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser("python -m examples", description=doc, formatter_class=raw)


def last_artifact() -> str:
    """The artifact of the last run in this folder."""
    found = filter(Path.exists, Path().glob("final_model.int*.ptz"))  # not links to nothing
    links = sorted(found, key=lambda path: path.stat().st_mtime)
    return str(links[-1]) if links else "final_model.int6.ptz"


def load(artifact: str) -> tuple[t.GPT, t.Hyperparameters, t.ByteCounter]:
    """The model in an artifact, on this machine's device, its settings and its tokenizer. The
    environment gives what an artifact does not hold, such as TOKENIZER_PATH. Windows are as long as
    in training, unless EVAL_SEQ_LEN says otherwise."""
    loaded, stored = t.load(artifact)
    length = str(min(stored.eval_seq_len, stored.train_seq_len))
    env = {"EVAL_SEQ_LEN": length, "EVAL_STRIDE": str(min(stored.eval_stride, int(length)))}
    hp = t.settings_to_score(artifact, stored.of_model(), {**env, **os.environ})
    model = t.GPT(hp)
    model.load_state_dict(loaded.state_dict())
    return model.to(t.Ranks({}).device), hp, t.ByteCounter(hp)


def run(main: Callable[[], None]) -> None:
    """Call `main`; an error that the user can fix is one line."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for consoles that know only ASCII
    try:
        main()
    except BrokenPipeError:  # as in `python -m examples.score_text ... | head`
        sys.stderr.close()
    except (t.UserError, RecordError, OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: {error}")
