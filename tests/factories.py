"""People, pictures and what they make, for tests. Pictures are drawn here; nothing is read from anywhere."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from webapp.accounts.models import User
from webapp.labelsets.models import Label, LabelSet
from webapp.library import services as library
from webapp.library.models import Blob, Category, Collection, Photo

_count = itertools.count(1)
COLOURS = ("crimson", "seagreen", "royalblue", "goldenrod", "purple", "teal", "sienna", "black")


def make_user(email: str = "", **values: object) -> User:
    return User.objects.create_user(
        email=email or f"person{next(_count)}@example.org", password="a-long-password", **values
    )


def picture(kind: int = 0, seed: int = 0, *, size: int = 96, format: str = "JPEG") -> bytes:
    """A drawn picture: `kind` decides shape and colour, `seed` place and noise. Different seeds, different bytes."""
    random = np.random.default_rng(1000 * kind + seed)
    noise = random.integers(200, 255, (size, size, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    draw = ImageDraw.Draw(image)
    x, y = (int(v) for v in random.integers(5, size // 3, 2))
    box = (x, y, x + size // 2, y + size // 2)
    shape = (draw.ellipse, draw.rectangle)[kind % 2]
    shape(box, fill=COLOURS[kind % len(COLOURS)])
    out = io.BytesIO()
    image.save(out, format)
    return out.getvalue()


def picture_folder(root: Path, classes: int = 3, each: int = 4, *, size: int = 96) -> Path:
    """A folder of class folders of drawn pictures."""
    for kind in range(classes):
        folder = root / f"class {kind}"
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(each):
            (folder / f"{seed}.jpg").write_bytes(picture(kind, seed, size=size))
    return root


def make_collection(owner: User, name: str = "Shapes") -> Collection:
    return library.create_collection(owner, name)


def make_photo(collection: Collection, category: str = "", *, name: str = "photo.jpg", content: bytes = b"") -> Photo:
    """A photo as a finished import leaves it; without content it has rows alone and no file."""
    n = next(_count)
    sha256 = f"{n:064x}"
    blob = Blob.objects.create(
        owner=collection.owner,
        sha256=sha256,
        size=len(content) or 1,
        state=Blob.State.READY,
        width=96,
        height=96,
        format="JPEG",
    )
    if content:
        from django.core.files.base import ContentFile
        from django.core.files.storage import default_storage

        for file_name in (blob.original_name, blob.thumbnail_name, blob.working_name):
            default_storage.save(file_name, ContentFile(content))
    place = None
    if category:
        place, _new = Category.objects.get_or_create(
            collection=collection,
            key=Category.key_of(category),
            defaults={"name": category.rpartition("/")[2], "path": category},
        )
    return Photo.objects.create(blob=blob, collection=collection, category=place, name=name, serial=n)


def make_label_set(owner: User, name: str = "My set", labels: tuple[str, ...] = ()) -> tuple[LabelSet, list[Label]]:
    from webapp.labelsets import services

    label_set = services.create_label_set(owner, name)
    return label_set, [services.add_label(label_set, label) for label in labels]
