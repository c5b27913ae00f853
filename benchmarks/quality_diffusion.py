"""Diffusion models: what each method does to the pictures, on the small trained pipelines of tests/assets.

    python benchmarks/quality_diffusion.py --pipeline sd|dit|FOLDER [--rows 'float,rtn-*'] [--device cuda] [--jobs 4]
                                           [--images 512] [--steps 25] [--output FILE.json] [--plot FILE.png]
    python benchmarks/quality_diffusion.py --list

Each row quantizes the pipeline with trajectories that the float one drew (other prompts' wordings, other seeds), then
draws the float pipeline's prompts from the float pipeline's seeds. Measured: Fréchet and kernel distance to the float
pictures of the same seeds ("fid", "kid") and of other seeds ("fid_other", "kid_other"), and to the real test set
("fid_real"); SSIM, PSNR and the distance in a classifier's maps against the picture of the same seed; the share of
pictures that the classifier takes for what was asked; bytes and bits per weight of the denoiser, and seconds. All in
the features of tests/assets/fashion-classifier: no number is a published FID. Noise is the 95 % interval of float
against float with other seeds ("float" is drawn with three).

Rows run in processes of their own, --jobs at a time (on several GPUs in turn); each is written as it ends. Those that
the file has with the same settings are kept, failed ones (with their error) are tried again. Nothing is downloaded.
--quick trains and searches next to nothing: it tells whether rows run, not how good they are.
"""

from diffusion.command import main

if __name__ == "__main__":
    main(__doc__)
