"""The engine's command line: results as JSON on standard output, progress and complaints on standard error."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fewshot_engine import cli, cli_classify, cli_evaluate, cli_text, cli_train, weights
from fewshot_engine.backbones import BACKBONES, Backbone, get_backbone
from fewshot_engine.datasets import from_folder
from fewshot_engine.errors import CheckpointError, ConfigError, EngineError, WeightsMissing

EMBED_HELP = """\
Writes an .npz file with the arrays embeddings (n, dim) float32, labels (n,) int64, classes and paths; row i is the
photo paths[i] of the class classes[labels[i]]. A file that is no photo is skipped and named.

  python -m fewshot_engine embed photos/ --out photos.npz

prints {"photos": 120, "classes": 6, "refused": [{"path": …, "reason": …}], "photos_per_s": 31.5}
"""
WEIGHTS_HELP = """\
Pretrained weights that no package carries are fetched once, checked, and kept for every later use without a network.

  python -m fewshot_engine weights --list                     what there is, and where its weights are
  python -m fewshot_engine weights resnet50                   fetch from its hub
  python -m fewshot_engine weights timm:vit_small_patch14_dinov2.lvd142m
  python -m fewshot_engine weights open_clip:ViT-B-32/laion2b_s34b_b79k
  python -m fewshot_engine weights resnet50 --from resnet50-11ad3fa6.pth

A file is a state dict as the backbone's own library saves it, as safetensors or as torch.save writes it; it is read
without executing anything in it. timm: and open_clip: need `pip install fewshot-studio[more-backbones]`.

prints {"name": …, "file": …, "sha256": …, "source": …, "source_sha256": …}; --list a line for each backbone:
{"name": …, "title": …, "dim": …, "image_size": …, "licence": …, "weights": "in its package" | "kept" | "to be fetched"
| "none: trained from scratch"}
"""
EXPORT_HELP = """\
Writes a zip that runs anywhere ONNX Runtime does, without this engine: model.onnx (pixels in, embeddings out, with an
adapted model's map in the graph), model.json (inputs, origin, the model's card), recipe.safetensors (an adapted model's
centre and map), LICENCES.txt and README.txt with the ten lines of Python that use it.

  python -m fewshot_engine export runs/birds --out birds.zip

prints what model.json says; largest_difference is what was measured between the graph and the encoder.
"""
BENCH_HELP = """\
How fast this machine embeds, answers and trains.

  python -m fewshot_engine bench --what embed      photos a second, from files and of the bare forward pass
  python -m fewshot_engine bench --what classify   from examples to an answer, and milliseconds for one photo
  python -m fewshot_engine bench --what train      episodes a second of adapt, at the encoder's dimension

The photos are drawn for the purpose. `make bench` compares with other people's code.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 after a sentence on standard error."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.run
    try:
        command(options)
    except (EngineError, OSError) as error:
        print(f"fewshot_engine: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fewshot_engine", description=__doc__, epilog="COMMAND --help explains each with an example."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    embed = cli.add_command(
        commands,
        "embed",
        _embed,
        title="embeddings of a folder of class folders, as an .npz file",
        explained=EMBED_HELP,
    )
    embed.add_argument("folder", type=Path, metavar="DIR", help="a folder of class folders, nested or not")
    embed.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="embeddings, labels, classes, paths")
    cli.add_level(embed)
    cli.add_encoder(embed)

    cli_classify.add_parsers(commands)

    take = cli.add_command(
        commands,
        "weights",
        _weights,
        title="fetch pretrained weights, take them from a file, or list them",
        explained=WEIGHTS_HELP,
    )
    take.add_argument("name", nargs="?", metavar="NAME", help="a backbone")
    take.add_argument("--from", dest="file", type=Path, metavar="FILE", help="a state dict, instead of a hub")
    take.add_argument("--list", action="store_true", help="every backbone, and where its weights are")
    cli.add_json(take)

    export = cli.add_command(
        commands,
        "export",
        _export,
        title="a model as a zip that ONNX Runtime can run without this engine",
        explained=EXPORT_HELP,
    )
    export.add_argument("model", metavar="CKPT", help="a folder that `train` wrote, or the name of an encoder")
    export.add_argument("--out", type=Path, required=True, metavar="BUNDLE.zip")
    cli.add_cache(export)

    bench = cli.add_command(
        commands, "bench", _bench, title="how fast this machine embeds, answers and trains", explained=BENCH_HELP
    )
    bench.add_argument("--what", choices=("embed", "train", "classify"), default="embed")
    bench.add_argument("--photos", type=cli.positive, default=300, help="drawn for the purpose (300)")
    cli.add_encoder(bench)

    for module in (cli_train, cli_evaluate, cli_text):
        module.add_parsers(commands)
    return parser


def _embed(options: argparse.Namespace) -> None:
    images = from_folder(options.folder, options.level)
    encoder, recipe = cli.load_encoder(options.encoder, options, views=options.views)
    started = time.monotonic()
    photos = cli.embed_images(images, encoder, none_will_do=True)
    _, (embeddings,) = cli.as_adapted(recipe, photos.embeddings)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "wb") as file:  # np.savez would add a suffix to a bare name
        np.savez(
            file,
            embeddings=embeddings,
            labels=photos.images.labels,
            classes=np.array(images.classes),
            paths=np.array(photos.images.paths, dtype=str),
        )
    cli.print_json(
        {
            "photos": len(embeddings),
            "classes": len(images.classes),
            "refused": photos.refused,
            "photos_per_s": round(len(embeddings) / (time.monotonic() - started), 1),
        }
    )


def _weights(options: argparse.Namespace) -> None:
    if options.list:
        for name in [*BACKBONES, *(name for name in weights.kept_names() if name not in BACKBONES)]:
            backbone = get_backbone(name)
            cli.print_json(
                {
                    "name": name,
                    "title": backbone.title,
                    "dim": backbone.dim(),
                    "image_size": backbone.image_size,
                    "licence": backbone.licence,
                    "weights": _where(backbone),
                }
            )
        return
    if options.name is None:
        raise ConfigError("name a backbone, or ask for --list")
    record = get_backbone(options.name).take_weights(options.file, say=cli.say)
    cli.print_json({key: getattr(record, key) for key in ("name", "file", "sha256", "source", "source_sha256")})


def _where(backbone: Backbone) -> str:
    if not backbone.pretrained:
        return "none: trained from scratch"
    try:
        return "kept" if weights.is_kept(backbone.weights()) else "in its package"
    except WeightsMissing:
        return "to be fetched"
    except CheckpointError as error:
        return str(error)


def _export(options: argparse.Namespace) -> None:
    from fewshot_engine.bundle import write_bundle  # torch comes with it

    cli.print_json(write_bundle(options.model, options.out, cache_dir=options.cache_dir))


def _bench(options: argparse.Namespace) -> None:
    from fewshot_engine.measuring import draw_photos, measure_classifying, measure_embedding, measure_training

    encoder, _ = cli.load_encoder(options.encoder, options, views=options.views)
    if options.what == "train":
        cli.print_json({"what": "train", **measure_training(encoder.dim)})
        return
    measure = measure_embedding if options.what == "embed" else measure_classifying
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_photos(Path(folder), options.photos)
        cli.print_json({"what": options.what, **measure(encoder, paths)})


if __name__ == "__main__":
    sys.exit(main())
