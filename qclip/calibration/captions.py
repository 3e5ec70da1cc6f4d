"""Captions for models that are calibrated on images without any: short and long, of things that photographs show."""

_SUBJECTS = (
    "dog",
    "cat",
    "bird",
    "child",
    "woman",
    "man",
    "car",
    "truck",
    "boat",
    "airplane",
    "horse",
    "flower",
    "house",
    "street",
    "mountain",
    "river",
    "red star",
    "blue circle",
    "bowl of fruit",
    "train",
)
_FORMS = (
    "a photo of a {}.",
    "a {}",
    "a black and white picture of the {} in the distance.",
    "two people look at a {} on a sunny afternoon while others walk past.",
    "a small {} on grass",
    "the {} stands next to a wooden fence, partly hidden.",
    "a close-up of a {} with a blurred background.",
    "a drawing of a {}.",
)
CAPTIONS = [form.format(subject) for form in _FORMS for subject in _SUBJECTS]
