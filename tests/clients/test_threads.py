"""One predictor in several threads, as servers use it without thinking: no answer may be about another image."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from tests.photos import PHOTOS

IMAGES = [PHOTOS["landscape"], PHOTOS["portrait"], PHOTOS["landscape"][:, ::-1].copy()]
BOX = np.array([120, 20, 300, 280])


def predict(predictor):
    masks, _, logits = predictor.predict(box=BOX, multimask_output=False)
    return masks, logits


def difference(a, b):
    """The largest of the logits; of images of different sizes infinite."""
    return np.abs(a[1] - b[1]).max() if a[0].shape == b[0].shape else np.inf


def test_answers_are_about_one_of_the_images_or_refused(sides):
    predictor, alone = sides.ours.predictor(), []
    for image in IMAGES:
        predictor.set_image(image)
        alone.append(predict(predictor))

    def ask(number):
        try:
            predictor.set_image(IMAGES[number % len(IMAGES)])
            return predict(predictor)
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(ask, range(9)))
    for answer in answers:
        if isinstance(answer, str):
            assert "thread" in answer or "set_image" in answer, answer
        else:
            found = [difference(answer, one) for one in alone]
            assert min(found) <= 1e-3, f"an answer about no image, or about two: it differs by {found}"


def test_predictors_of_their_own_share_a_model(sides):
    sam = sides.ours.build()
    predictors = [sides.ours.api.SamPredictor(sam) for _ in IMAGES]

    def ask(number):
        with torch.no_grad():
            predictors[number].set_image(IMAGES[number])
        return predict(predictors[number])

    alone = [ask(number) for number in range(len(IMAGES))]
    with ThreadPoolExecutor(3) as pool:
        for found, expected in zip(pool.map(ask, range(len(IMAGES))), alone):
            assert difference(found, expected) <= 1e-3
