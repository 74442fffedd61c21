"""The shipped templates and blueprints: their nodes, links, values and notes. dev/make_templates.py writes the files."""

from dev.graphs import (
    DEGRADED,
    LOADER,
    MEASUREMENT,
    MODEL,
    TRUTH,
    VAE,
    Node,
    Template,
    blueprint,
    cpigdm,
    degraded,
    one_node,
    operator,
    own_photo,
    picture,
    psld,
    restored,
    stock_graph,
)

BOX = operator("PosteriorMask", 0, pattern="box", pattern__x=36, pattern__y=40, pattern__width=56, pattern__height=48)

SWAP = """Runs as installed. For your own photo and model remove **Compare** and **Truth**, where they are, set the numbers of **Operator** to your photo's, and replace
* **Load Demo Prior** by **Load Checkpoint**,
* **Demo Pictures** by **Load Image**,
* **Measure (simulate)** by **Measurement from Photo**, with your photo's noise.

Stable Diffusion wants a prompt: write what the picture shows, and with Restore's or the guider's cfg at 3 or 4 connect a negative one, too; it may be empty."""

OWN_MASK = "The losses are invented: set the pattern of **Operator** to mask, and connect the mask of Load Image."

DEMO_TEMPLATES = [
    Template(
        "super_resolution_x8",
        "## x8 super-resolution with C-PiGDM\n16 x 16 pixels become 128 x 128 in 20 network calls, and made smaller again they are the "
        f"16 x 16. It starts from the enlarged photo under noise of sigma 2 (denoise .6), which hides what is wrong with it.\n\n{SWAP}",
        stock_graph(
            [operator("PosteriorDownscale", method="area", method__factor=8)], cpigdm(), steps=20, pictures=(5, 4), denoise=0.6
        ),
    ),
    Template(
        "super_resolution_x4",
        "## x4 super-resolution with PSLD\nA photo made smaller by bicubic resampling, as most programs do. PSLD follows the gradient "
        "through the model and its VAE in each of 20 steps, from the enlarged photo under noise of sigma 1.2 (denoise .4), as Restore does. It "
        f"takes more memory than C-PiGDM; with the demo prior it is level with it in boxes, elsewhere behind.\n\n{SWAP}",
        stock_graph(
            [operator("PosteriorDownscale", method="bicubic", method__factor=4.0)],
            psld(),
            steps=20,
            pictures=(2, 1),
            denoise=0.4,
        ),
    ),
    Template(
        "inpaint_box",
        f"## Box inpainting with C-PiGDM\nThe box is invented, every other pixel comes back bit-exact.\n\n{SWAP}\n\n{OWN_MASK}",
        stock_graph([BOX], cpigdm(), steps=20, pictures=(5, 4), hole=True),
    ),
    Template(
        "inpaint_free_form",
        "## Holes of any shape with Restore\nFlakes have come off the picture: single lost pixels, grown. They are filled; every other "
        f"pixel comes back bit-exact.\n\n{SWAP}\n\nThe losses are invented: remove **Specks**, **Specks as Mask** and **Flakes**, and connect the mask of Load "
        "Image to **Operator**; paint it in the mask editor.",
        one_node(
            [
                operator("PosteriorMask", 0, "Specks", pattern="random", pattern__fraction=0.01, pattern__seed=3),
                Node("PosteriorMeasureSimulate", "Specks as Mask", 1, {"image": TRUTH, "operator": ("Specks", 0)}),
                Node("GrowMask", "Flakes", 2, {"mask": ("Specks as Mask", 2), "expand": 3}),
                operator("PosteriorMask", 3, pattern="mask", pattern__mask=("Flakes", 0)),
            ],
            first=6,
        ),
    ),
    Template(
        "deblur_gaussian",
        "## Gaussian deblurring with Restore\nA soft photo with a little noise. **Estimate Blur** reads the width of your photo's blur "
        f"from a crop of one sharp edge, **Estimate Noise** its sigma.\n\n{SWAP}",
        one_node([operator("PosteriorBlur", 0, kernel="gaussian", kernel__sigma=3.0)], first=6, sigma=0.01, quality="best"),
    ),
    Template(
        "deblur_motion",
        "## Motion deblurring with Restore\nThe camera moved. **Estimate Blur** reads the path from a crop of one point of light in "
        f"your photo.\n\n{SWAP}",
        one_node([operator("PosteriorBlur", 0, kernel="motion", kernel__length=15.0, kernel__angle=30.0)], first=1, sigma=0.01),
    ),
    Template(
        "destripe",
        f"## Destriping with C-PiGDM\nFour of every sixteen lines are dead. **Find Stripes** finds them in your photo.\n\n{SWAP}\n\n"
        "The losses are invented: set the pattern of **Operator** to mask, and connect the mask of **Find Stripes**.",
        stock_graph(
            [operator("PosteriorMask", 0, pattern="stripes", pattern__period=16, pattern__width=4)],
            cpigdm(),
            steps=10,
            pictures=(4, 1),
            hole=True,
        ),
    ),
    Template(
        "denoise",
        f"## Denoising with Restore\nStrong noise, sigma 0.1. **Estimate Noise** reads the sigma of your photo.\n\n{SWAP}",
        one_node([operator("PosteriorIdentity")], first=7, sigma=0.1),
    ),
    Template(
        "colourise",
        "## Colourisation with Restore\nThe brightness of each pixel stays as it is; the colours are the model's, and another seed "
        f"gives others.\n\n{SWAP}",
        one_node([operator("PosteriorGrayscale")], first=13, quality="best"),
    ),
    Template(
        "old_photo",
        "## An old photo, with Restore\nFour things happened to it, one after the other: black and white, soft, scratched, grainy. Each "
        f"operator node takes the one before; the grain is the sigma of the measurement.\n\n{SWAP}\n\n{OWN_MASK} Leave it out if nothing is lost.",
        one_node(
            [
                operator("PosteriorGrayscale", 0, title="Black and White"),
                operator("PosteriorBlur", 1, "Soft", operator=("Black and White", 0), kernel="gaussian", kernel__sigma=1.5),
                operator(
                    "PosteriorMask",
                    2,
                    operator=("Soft", 0),
                    pattern="stripes",
                    pattern__period=0,
                    pattern__width=2,
                    pattern__direction="vertical",
                    pattern__fraction=0.12,
                    pattern__seed=1,
                ),
            ],
            first=3,
            sigma=0.03,
            quality="best",
        ),
    ),
    Template(
        "uncertainty",
        "## Which details are invented\nFour results for one photo: their mean, and at each pixel how much they differ. Black is "
        f"certain, white is invented.\n\n{SWAP}\n\n{OWN_MASK}",
        [
            *degraded([BOX], (6, 1), 0.0),
            Node("PosteriorRestore", "Restore", 2, restored(samples=4, quality="best")),
            Node("PosteriorUncertainty", "Uncertainty", 3, {"samples": ("Restore", 0)}),
            Node("SaveImage", "Result", 4, {"images": ("Uncertainty", 0), "filename_prefix": "posterior"}),
            picture("Map", 4, ("Uncertainty", 1)),
            picture("Truth", 4, TRUTH),
        ],
        before="Result",
        after="Map",
    ),
]


OWN_TEMPLATES = [
    Template(
        "sd15_super_resolution",
        "## Your small photo, x4, with Stable Diffusion 1.5\nLoad a photo of 128 x 128 pixels or so; the result is four times larger. "
        "Write what it shows. Choose your checkpoint. If it is or was a JPEG, enter a sigma in **Measurement from Photo**, 0.02 say: with 0 "
        "its blocks become details.",
        own_photo(
            "v1-5-pruned-emaonly-fp16.safetensors",
            "photo of a ...",
            [operator("PosteriorDownscale", 1, method="bicubic", method__factor=4.0)],
            cfg=4.0,
        ),
    ),
    Template(
        "sdxl_inpaint",
        "## Fill what you painted over, with SDXL\nLoad a photo of about 1024 x 1024, right-click it, **Open in Mask Editor**, and paint "
        "over what is to go. Write what the picture shows. Every other pixel stays as it is.",
        own_photo(
            "sd_xl_base_1.0.safetensors",
            "photo of a ...",
            [operator("PosteriorMask", 1, pattern="mask", pattern__mask=("Load Image", 1))],
            cfg=4.0,
        ),
    ),
    Template(
        "sd3_deblur",
        "## Sharpen a blurred photo, with Stable Diffusion 3\nLoad a photo of about 1024 x 1024. Set the width of its blur, or let "
        "**Estimate Blur** read it from a crop of one sharp edge, and its noise.",
        own_photo(
            "sd3_medium_incl_clips.safetensors",
            "photo of a ...",
            [operator("PosteriorBlur", 1, kernel="gaussian", kernel__sigma=3.0)],
            sigma=0.01,
            cfg=4.0,
        ),
    ),
]

TEMPLATES = [*DEMO_TEMPLATES, *OWN_TEMPLATES]


# Not shipped: the nodes that no template has, so that their help pages show them.
GALLERY = Template(
    "gallery",
    "",
    [
        Node("PosteriorLoadDemoPrior", LOADER, 0),
        Node("PosteriorDemoPictures", "Demo Pictures", 0, {"first": 4}),
        operator("PosteriorMask", pattern="stripes", pattern__period=16, pattern__width=6),
        operator("PosteriorIdentity", title="Noise Only"),
        Node("PosteriorMeasureSimulate", "Measure (simulate)", 1, {"image": TRUTH, "operator": ("Operator", 0)}),
        Node(
            "PosteriorMeasureSimulate",
            "Noisy",
            1,
            {"image": TRUTH, "operator": ("Noise Only", 0), "noise": "Poisson", "noise.peak": 100.0},
        ),
        Node("PosteriorEstimateNoise", "Estimate Noise", 2, {"photo": ("Noisy", 1)}),
        Node("PreviewAny", "Sigma", 3, {"source": ("Estimate Noise", 0)}),
        Node("PosteriorEstimateStripes", "Find Stripes", 2, {"photo": DEGRADED}),
        Node("MaskToImage", "Lines", 3, {"mask": ("Find Stripes", 0)}),
        picture("Lost", 4, ("Lines", 0)),
        operator("PosteriorBlur", title="Blur", kernel="gaussian", kernel__sigma=2.5),
        Node("PosteriorMeasureSimulate", "Blurred", 1, {"image": TRUTH, "operator": ("Blur", 0)}),
        Node("PosteriorEstimateBlur", "Estimate Blur", 2, {"photo": ("Blurred", 1), "method": "whole photo"}),
        Node("PreviewAny", "Width", 3, {"source": ("Estimate Blur", 1)}),
        Node(
            "PosteriorMeasurementFromPhoto",
            "Measurement from Photo",
            2,
            {"photo": ("Noisy", 1), "operator": ("Noise Only", 0), "noise": "estimated"},
        ),
        Node("PosteriorSaveMeasurement", "Save Measurement", 3, {"measurement": ("Measurement from Photo", 0)}),
        Node(
            "PosteriorCombineMeasurements",
            "Combine Measurements",
            3,
            {"first": ("Measurement from Photo", 0), "second": ("Noisy", 0)},
        ),
        Node("PosteriorMemoryEstimate", "Memory Estimate", 4, {"model": MODEL, "vae": VAE, "measurement": MEASUREMENT}),
        Node("PosteriorConsistency", "Consistency", 4, {"image": TRUTH, "measurement": ("Combine Measurements", 0)}),
        Node("PosteriorLoadMeasurement", "Load Measurement", 5, {"file": "measurements/posterior_00001_.safetensors [output]"}),
    ],
)


BLUEPRINTS = [
    blueprint(
        "Posterior Upscale",
        "A larger picture that, made smaller again, is your photo.",
        0.0,
        operator("PosteriorDownscale", method="bicubic", method__factor=4.0),
        ["method.factor"],
    ),
    blueprint(
        "Posterior Deblur",
        "A sharp picture that, blurred again, is your photo.",
        0.01,
        operator("PosteriorBlur", 0, kernel="gaussian", kernel__sigma=3.0),
        ["kernel.sigma"],
    ),
    blueprint(
        "Posterior Inpaint",
        "The painted holes filled; every other pixel as it was.",
        0.0,
        operator("PosteriorMask", 0, pattern="mask", pattern__mask=("mask", 0)),
        [],
        mask=True,
    ),
]
