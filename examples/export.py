"""Turn a packed model into a plain state dict and back.

    python -m examples.export OUT.safetensors [ARTIFACT]      the weights as float32, by name
    python -m examples.export --back IN.safetensors OUT.ptz   pack them (rounded to rows' codes)

The file's metadata has the settings of the model, as text. `pip install safetensors` first.
"""

import dataclasses
from pathlib import Path

import train_gpt as t
from examples import last_artifact, new_parser, run


def export(artifact: str, out: str) -> None:
    from safetensors.torch import save

    model, hp = t.load(artifact)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    t.replace_file(Path(out), lambda file: file.write(save(state, metadata=hp.of_model())))


def pack(weights: str, out: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "pt") as file:
            settings, names = file.metadata() or {}, list(file.keys())
            state = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise t.UserError(f"{weights}: no safetensors file ({error})") from None
    t.require(bool(settings), f"{weights}: holds no settings; was it made by examples.export?")
    hp = dataclasses.replace(t.Hyperparameters.from_env(settings), quantizer="rows")
    packed = t.compress(state, hp, {}, t.SIZE_CAP - len(t.SOURCE))
    t.replace_file(Path(out), lambda file: file.write(packed.container.blob))


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("first", metavar="FILE")
    parser.add_argument("second", metavar="FILE", nargs="?", default="")
    parser.add_argument("--back", action="store_true", help="from safetensors to an artifact")
    args = parser.parse_args()
    if args.back:
        t.require(bool(args.second), "--back: expected two files, IN.safetensors and OUT.ptz")
        pack(args.first, args.second)
    else:
        export(args.second or last_artifact(), args.first)
    print(args.second if args.back else args.first)


if __name__ == "__main__":
    run(main)
