"""Let a packed model write.

    TOKENIZER_PATH=FILE python -m examples.sample [ARTIFACT] --prompt "Return the" [--tokens 200]
        [--temperature 0.8] [--seed 1] [--cache 0.1]

ARTIFACT is by default that of the last run. With --cache, words of the text so far come back more
often: p = (1 - w) * model + w * cache, where the cache is the mixture's (train_gpt.DocumentCache).
The same seed gives the same text.
"""

import numpy as np
import torch

import train_gpt as t
from examples import last_artifact, load, new_parser, run


@torch.inference_mode()
def write(model: t.GPT, tokens: list[int], count: int, temperature: float, w: float) -> list[int]:
    """`tokens` and `count` more, drawn one after the other."""
    _, passes = t.block_passes(model.hp)
    text = np.zeros(len(tokens) + count, np.uint16)
    text[: len(tokens)] = tokens
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
        cache.extend(end - 1, end, logp_V[None, text[end]].double().exp().numpy())
    return text.tolist()


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
    text = write(model, prompt, args.tokens, args.temperature, args.cache)
    print(counter.pieces.decode(text))


if __name__ == "__main__":
    run(main)
