"""Images: folders of pictures and the built-in digits, as float32 batches.

`folder` and `digits` give `Images`; `Images.batches` gives arrays. A picture is read and prepared in the same way
wherever it comes from (`pictures`), so training, calibration and parity see the same numbers.
"""

from deploykit.data.builtin import digits
from deploykit.data.folders import folder
from deploykit.data.images import Images, calibration_subset
from deploykit.data.pictures import open_image, preprocess
from deploykit.data.splits import Splits, to_train_and_to_hold_out

__all__ = ["Images", "Splits", "calibration_subset", "digits", "folder", "open_image", "preprocess", "to_train_and_to_hold_out"]
