"""The training set: pictures in memory, how often each is drawn, and how it is described."""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CATEGORY_WEIGHTS = {"People & Body": 0.7, "Symbols": 0.3, "Flags": 0.5}
"""How often a category is drawn, everything else being 1. Few people ask for a keycap."""

VARIANT_WEIGHT = 0.1
"""For near-copies: the 24 clock faces, and each activity drawn with a man, a woman and a person."""

CLOCK_FACE = (" oclock", " thirty")
PERSON = re.compile(r"(man|woman|men|women|person|people|couple|kiss|family)\b.+")

OTHER_NAMES = {
    "admission tickets": ("tickets",),
    "airplane": ("plane", "aeroplane", "jet"),
    "alarm clock": ("clock",),
    "american football": ("football ball",),
    "automobile": ("car", "red car"),
    "backpack": ("school bag", "rucksack"),
    "baguette bread": ("baguette",),
    "beer mug": ("beer", "mug of beer"),
    "bicycle": ("bike",),
    "birthday cake": ("cake",),
    "bookmark tabs": ("tabs",),
    "books": ("stack of books",),
    "bottle with popping cork": ("champagne", "bottle of champagne"),
    "bouquet": ("bouquet of flowers", "flowers"),
    "bullseye": ("target", "dart board"),
    "cat face": ("kitten", "face of a cat"),
    "cheese wedge": ("cheese", "piece of cheese"),
    "chequered flag": ("checkered flag", "racing flag"),
    "cherries": ("cherry",),
    "chicken": ("hen",),
    "christmas tree": ("decorated tree",),
    "classical building": ("temple with columns",),
    "cloud with lightning": ("thunderstorm",),
    "cloud with rain": ("rain cloud", "rain"),
    "clown face": ("clown",),
    "collision": ("explosion",),
    "cooked rice": ("bowl of rice", "rice"),
    "couch and lamp": ("couch", "sofa"),
    "cow face": ("face of a cow",),
    "crescent moon": ("moon",),
    "crossed swords": ("swords", "two swords"),
    "deciduous tree": ("tree", "green tree", "leafy tree"),
    "delivery truck": ("truck", "lorry", "van"),
    "desktop computer": ("computer", "monitor", "pc"),
    "dog face": ("puppy", "face of a dog"),
    "dollar banknote": ("money", "dollar bill", "banknote"),
    "doughnut": ("donut",),
    "dragon face": ("face of a dragon",),
    "ear of corn": ("corn", "maize"),
    "eggplant": ("aubergine",),
    "envelope": ("letter", "mail"),
    "evergreen tree": ("pine tree", "fir tree", "conifer"),
    "face with tears of joy": ("laughing face", "laughing emoji"),
    "fire": ("flame",),
    "fire engine": ("fire truck",),
    "flying saucer": ("ufo", "spaceship"),
    "four leaf clover": ("clover", "lucky clover"),
    "french fries": ("fries", "chips"),
    "game die": ("dice", "die"),
    "gem stone": ("diamond", "gem", "jewel"),
    "globe showing americas": ("earth", "globe", "planet earth"),
    "glowing star": ("shining star",),
    "graduation cap": ("mortarboard",),
    "grapes": ("bunch of grapes",),
    "grinning face": ("happy face", "smiley"),
    "hamburger": ("burger", "cheeseburger"),
    "headphone": ("headphones",),
    "high heeled shoe": ("high heel", "red shoe"),
    "honeybee": ("bee",),
    "horse face": ("face of a horse",),
    "hot beverage": ("coffee", "cup of coffee", "cup of tea", "coffee cup"),
    "hot dog": ("hotdog",),
    "hot pepper": ("chili", "chili pepper"),
    "hourglass done": ("hourglass",),
    "ice cream": ("bowl of ice cream",),
    "jack o lantern": ("pumpkin", "halloween pumpkin"),
    "kiwi fruit": ("kiwi",),
    "lady beetle": ("ladybug", "ladybird"),
    "laptop": ("laptop computer", "notebook computer"),
    "light bulb": ("bulb", "lamp"),
    "locked": ("lock", "padlock"),
    "locomotive": ("steam train", "steam locomotive"),
    "loudly crying face": ("sobbing face",),
    "magnifying glass tilted left": ("magnifying glass", "loupe"),
    "mobile phone": ("smartphone", "phone", "cell phone"),
    "money bag": ("bag of money",),
    "monkey face": ("face of a monkey",),
    "motorcycle": ("motorbike",),
    "mouse face": ("face of a mouse",),
    "musical note": ("music note", "note"),
    "office building": ("skyscraper", "building"),
    "old key": ("antique key",),
    "palm tree": ("palm",),
    "panda": ("panda face", "panda bear"),
    "party popper": ("party",),
    "pencil": ("yellow pencil",),
    "pig face": ("face of a pig",),
    "pile of poo": ("poop",),
    "pizza": ("slice of pizza", "pizza slice"),
    "police car": ("police cruiser",),
    "rabbit face": ("bunny", "face of a rabbit"),
    "red apple": ("apple",),
    "red heart": ("heart", "love"),
    "ringed planet": ("saturn", "planet"),
    "rocket": ("space rocket", "space ship"),
    "sailboat": ("boat", "sailing boat"),
    "santa claus": ("santa",),
    "sauropod": ("dinosaur", "brontosaurus"),
    "school": ("school building",),
    "skull": ("death head",),
    "smiling face with heart eyes": ("heart eyes", "face in love"),
    "smiling face with sunglasses": ("cool face",),
    "snow capped mountain": ("snowy mountain",),
    "soccer ball": ("football", "ball"),
    "soft ice cream": ("ice cream cone", "soft serve"),
    "speech balloon": ("speech bubble",),
    "star": ("yellow star",),
    "sun with face": ("smiling sun",),
    "t rex": ("tyrannosaurus", "tyrannosaurus rex"),
    "t shirt": ("shirt", "tee shirt"),
    "tangerine": ("orange", "orange fruit", "mandarin"),
    "teacup without handle": ("green tea", "tea"),
    "telephone": ("old telephone",),
    "television": ("tv",),
    "tiger face": ("face of a tiger",),
    "triangular flag": ("red flag",),
    "trophy": ("golden cup", "gold trophy"),
    "tropical drink": ("cocktail",),
    "tropical fish": ("yellow fish",),
    "umbrella": ("open umbrella",),
    "video game": ("game controller", "gamepad"),
    "waving hand": ("hand",),
    "white large square": ("white square",),
    "wine glass": ("glass of wine", "red wine", "wine"),
    "wrapped gift": ("gift", "present"),
}
"""Everyday words for pictures whose Unicode name few people would type."""

STYLED_TEMPLATES = (
    (40, "{name}, {style} style"),
    (16, "{article} {name}, {style} style"),
    (6, "{name} in {style} style"),
    (5, "{article} {name} in {style} style"),
    (4, "{style} style {name}"),
    (3, "{style} style, {name}"),
    (2, "{style} {name}"),
    (3, "{name} emoji, {style} style"),
    (3, "{style} emoji of {article} {name}"),
    (2, "{name} in the style of {style}"),
    (2, "{opening} {article} {name}, {style} style"),
    (2, "{article} {adjective} {name}, {style} style"),
    (2, "{name}, {style} style, {ending}"),
)
"""(weight, template); these name the style."""

PLAIN_TEMPLATES = (
    (6, "{name}"),
    (3, "{article} {name}"),
    (2, "{name} emoji"),
    (2, "{opening} {article} {name}"),
    (1, "{article} {adjective} {name}"),
    (1, "{article} {name}, {ending}"),
)
"""These leave the style open."""

OPENINGS = (
    "a picture of", "a drawing of", "an illustration of", "an icon of", "an emoji of", "an image of",
    "a photo of", "a simple drawing of", "clip art of", "a painting of", "draw",
)  # fmt: skip
ADJECTIVES = ("cute", "nice", "beautiful", "simple", "small", "big", "single", "colorful", "lovely", "detailed")
ENDINGS = (
    "on a white background", "white background", "high quality", "flat design", "vector art", "centered",
    "simple", "cute", "best quality", "icon", "isolated on white",
)  # fmt: skip


def describe(name: str, style: str, rng: random.Random) -> str:
    """Draw one caption for the picture ``name`` in ``style``: wording, article, order and case vary.

    >>> describe("red apple", "noto", random.Random(0))
    'red apple, noto style'
    """
    if name in OTHER_NAMES and rng.random() < 0.3:
        name = rng.choice(OTHER_NAMES[name])
    templates = STYLED_TEMPLATES if rng.random() < 0.88 else PLAIN_TEMPLATES
    (template,) = rng.choices([t for _, t in templates], [w for w, _ in templates])
    adjective = rng.choice(ADJECTIVES)
    follower = adjective if "{adjective}" in template else name
    article = rng.choice(["the", "one"]) if rng.random() < 0.1 else "an" if follower[0] in "aeiou" else "a"
    caption = template.format(
        name=name,
        style=style,
        article=article,
        adjective=adjective,
        opening=rng.choice(OPENINGS),
        ending=rng.choice(ENDINGS),
    )
    case = rng.random()
    if case < 0.08:
        caption = caption[0].upper() + caption[1:]
    elif case < 0.10:
        caption = caption.title()
    elif case < 0.11:
        caption = caption.upper()
    if rng.random() < 0.05:
        caption += "."
    return caption


@dataclass(frozen=True)
class Renderings:
    """All pictures with their labels, in one fixed order."""

    pictures: Tensor
    """uint8, (N, 3, 128, 128)"""
    names: list[str]
    styles: list[str]
    weights: Tensor
    """float, (N,): how often a picture is drawn in training, mean 1"""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def classes(self) -> list[str]:
        """The distinct names, sorted; a name has up to one picture per style."""
        return sorted(set(self.names))

    def labels(self) -> Tensor:
        """Index of every picture's name in `classes`."""
        index = {name: i for i, name in enumerate(self.classes)}
        return torch.tensor([index[name] for name in self.names])


def sampling_weight(name: str, category: str) -> float:
    """How often to draw a picture, before normalisation."""
    if name.endswith(CLOCK_FACE) or (category == "People & Body" and PERSON.match(name)):
        return VARIANT_WEIGHT
    return CATEGORY_WEIGHTS.get(category, 1.0)


def load_renderings(folder: Path) -> Renderings:
    """Read the image folder that ``render.py`` wrote."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pictures = np.stack([np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows])
    weights = torch.tensor([sampling_weight(row["name"], row["category"]) for row in rows])
    return Renderings(
        pictures=torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(),
        names=[row["name"] for row in rows],
        styles=[row["style"] for row in rows],
        weights=weights / weights.mean(),
    )


def draw_table(weights: Tensor, length: int = 1 << 16) -> Tensor:
    """Indices repeated in proportion to ``weights``.

    A uniform draw from this table is a weighted draw without a host synchronisation.
    """
    bounds = (weights.double().cumsum(0) / weights.double().sum() * length).round().long()
    return torch.repeat_interleave(torch.arange(len(weights)), bounds.diff(prepend=torch.zeros(1, dtype=torch.long)))
