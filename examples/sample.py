"""Let a packed model write.

    TOKENIZER_PATH=FILE python -m examples.sample [ARTIFACT] --prompt "Return the" [--tokens 200]
        [--temperature 0.8] [--seed 1] [--cache 0.1]

ARTIFACT is by default that of the last run; the same seed gives the same text. With --cache, words
come back more often: p = (1 - w) * model + w * cache, the mixture's (train_gpt.DocumentCache).
"""

import numpy as np
import torch

import train_gpt as t
from examples import last_artifact, load, new_parser, run


@torch.inference_mode()
def write(model: t.GPT, tokens: list[int], count: int, temperature: float, w: float):
    """Yields `tokens` with one, two and up to `count` more, drawn one after the other."""
    _, passes = t.block_passes(model.hp)
    text = np.array([*tokens, *[0] * count], np.uint16)
    cache = t.DocumentCache(text)
    for end in range(1, len(text)):
        ids = torch.from_numpy(text[:end][-model.hp.eval_seq_len :].astype(np.int64))
        hidden_D = model.hidden(ids[None].to(model.embed.weight.device), passes, last=1)[0, -1]
        logp_V = t.log_probabilities(model.logits(hidden_D)[None], model.hp.logit_softcap)[0].cpu()
        if end >= len(tokens):
            mixed_V = torch.softmax(logp_V.double() / max(temperature, 1e-6), 0)
            sums_V, total = cache.distribution(end - 1, len(mixed_V))
            if total:
                mixed_V = (1 - w) * mixed_V + w * torch.from_numpy(sums_V / total)
            text[end] = torch.multinomial(mixed_V, 1)
            yield text[: end + 1].tolist()
        cache.extend(end - 1, end, logp_V[None, text[end]].double().exp().numpy())


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("artifact", nargs="?", default=last_artifact())
    parser.add_argument("--prompt", default="The")
    parser.add_argument("--tokens", type=int, default=200, help="to write (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="lower: surer (0.8)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=float, default=0.0, metavar="W", help="its weight (0)")
    args = parser.parse_args()
    t.require(args.tokens >= 0 and args.temperature >= 0, "--tokens, --temperature: expected >= 0")
    t.require(0 <= args.cache <= 1, f"--cache {args.cache}: expected 0 to 1")
    model, _, counter = load(args.artifact)
    torch.manual_seed(args.seed)
    prompt = [t.BOS, *counter.pieces.encode(args.prompt)]
    torch.set_num_threads(1)  # many tiny steps: threads would only wait for each other
    shown = ""
    for tokens in write(model, prompt, args.tokens, args.temperature, args.cache):
        before, shown = shown, counter.pieces.decode(tokens).rstrip("\ufffd")  # half a letter
        print(shown[len(before) :], end="", flush=True)
    print()


if __name__ == "__main__":
    run(main)
