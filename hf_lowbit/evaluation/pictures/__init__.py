"""Quality of pictures: distances between sets of them, likeness to the float model's of the same seeds, agreement."""

from hf_lowbit.evaluation.pictures.agreement import agreement, labels_of_prompts
from hf_lowbit.evaluation.pictures.classifier import ClassifierConfig, PictureClassifier, Seen
from hf_lowbit.evaluation.pictures.comparison import Comparison, compare
from hf_lowbit.evaluation.pictures.drawing import PromptError, draw_pictures
from hf_lowbit.evaluation.pictures.frechet import GaussianFit, fit_gaussian, frechet_distance
from hf_lowbit.evaluation.pictures.kernel import KernelDistance, kernel_distance, polynomial_mmd
from hf_lowbit.evaluation.pictures.noise import is_within_noise, noise_interval, paired_interval
from hf_lowbit.evaluation.pictures.perceptual import map_distance
from hf_lowbit.evaluation.pictures.pretrained import InceptionFeatures, clip_score
from hf_lowbit.evaluation.pictures.similarity import psnr, ssim
from hf_lowbit.evaluation.pictures.summary import compare_pictures

__all__ = [
    "ClassifierConfig",
    "Comparison",
    "GaussianFit",
    "InceptionFeatures",
    "KernelDistance",
    "PictureClassifier",
    "PromptError",
    "Seen",
    "agreement",
    "clip_score",
    "compare",
    "compare_pictures",
    "draw_pictures",
    "fit_gaussian",
    "frechet_distance",
    "is_within_noise",
    "kernel_distance",
    "labels_of_prompts",
    "map_distance",
    "noise_interval",
    "paired_interval",
    "polynomial_mmd",
    "psnr",
    "ssim",
]
