"""For teachers: wrong answers that the checks of lesson 9 must find, bugs to plant, questions."""

from course.lessons import Fault, Wrong

WRONG = {
    "last_steps": (
        Wrong("path[-1 - int(steps * strength) :]", "path[: 1 + int(steps * strength)]",
              "the last steps remain, not the first"),
        Wrong("path[-1 - int(steps * strength) :]", "path[-int(steps * strength) :]",
              "k steps need k + 1 states"),
        Wrong("steps = len(path) - 1", "steps = len(path)", "a path has one state more than steps"),
        Wrong(" or int(steps * strength) < 1", "", "a strength that leaves no step is refused"),
    ),
    "TextToImage.encode_text": (
        Wrong("tokens[:, -1:].expand(-1, missing)", "tokens.new_zeros(len(tokens), missing)",
              "end tokens fill the row, not token 0"),
        Wrong("(tokens, tokens[:, -1:].expand(-1, missing)), dim=1",
              "(tokens[:, -1:].expand(-1, missing), tokens), dim=1", "the filling stands behind"),
        Wrong("tokens = torch.cat((tokens, tokens[:, -1:].expand(-1, missing)), dim=1)", "pass",
              "a context has the full length"),
    ),
    "TextToImage.null_context": (
        Wrong("self.encode_text(negative)", "self.encode_text('')",
              "negative prompts are encoded"),
        Wrong("return self.encode_text(\"\")", "return None", "else it is an empty text"),
        Wrong("if self.config.diffusion.learned_null:", "if False:",
              "a model that learned a null context needs none"),
    ),
    "with_correction": (
        Wrong("x0 = correct(x0)", "pass", "the estimate is corrected"),
        Wrong("(x - alpha * x0) / sigma", "(x - x0) / sigma", "the estimate is scaled by alpha"),
        Wrong("x0, _ = denoise(x, t, alpha, sigma)\n    x0 = correct(x0)\n"
              "    return x0, (x - alpha * x0) / sigma",
              "x0, eps = denoise(x, t, alpha, sigma)\n    return correct(x0), eps",
              "the eps has to follow from the corrected estimate"),
    ),
    "match_means": (
        Wrong("(small - means) / (goal - means)", "small - means",
              "a share of the way, not the distance"),
        Wrong(".nan_to_num()", "", "a block that is black and stays black divides 0 by 0"),
        Wrong("torch.where(small > means, 1.0, -1.0)", "torch.where(small > means, 1.0, 0.0)",
              "a darker block goes towards black, -1"),
        Wrong("torch.lerp(images, goal, share)", "images + share",
              "all pixels go the same share of their way, so none leaves [-1, 1]"),
    ),
    "TextToImage.keep_known": (
        Wrong("torch.where(unknown, drawn, images)", "torch.where(unknown, images, drawn)",
              "what is known is kept"),
        Wrong("torch.where(unknown_z, x0, z)", "torch.where(unknown_z, z, x0)",
              "the latent of what is known is kept"),
        Wrong("F.max_pool2d(unknown.float(), factor) > 0",
              "F.avg_pool2d(unknown.float(), factor) > 0.5",
              "one unknown pixel makes its position unknown"),
        Wrong("mask > 0.5", "mask >= 1", "a mask above a half counts"),
    ),
    "TextToImage.enlarge": (
        Wrong("x0 + self.encode_images(matched) - self.encode_images(drawn)",
              "self.encode_images(matched)", "the error of encoding must cancel"),
        Wrong("matched = match_means(drawn, small)", "matched = drawn", "the means are moved"),
        Wrong("return match_means(drawn, small)", "return drawn", "the result has the right means"),
        Wrong("self.encode_images(matched) - self.encode_images(drawn)",
              "self.encode_images(drawn) - self.encode_images(matched)",
              "the estimate moves towards the matched image"),
    ),
}  # fmt: skip

MODULE = "tinyfm/text2image.py"
FAULTS = (
    Fault(
        MODULE,
        "TextToImage.decode",
        "self.autoencoder.restore(latents)",
        "latents",
        "After training, latents have mean 0 and variance 1. Samples look washed out, although the "
        "autoencoder alone gives sharp images and the denoiser's loss is as low as ever.",
        "The latents are decoded without the mean and the scale that they had before.",
    ),
    Fault(
        MODULE,
        "TextToImage.first_state",
        'if "mask" in given and strength == 1:',
        "if strength == 2:",
        "Inpainting with a mask over the whole image should draw something new. It draws a shadow "
        "of the image that was given.",
        "Even at strength 1 the path starts at alpha z + sigma eps with alpha above 0: the latent "
        "shows through.",
    ),
    Fault(
        MODULE,
        "TextToImage.plan",
        "denoise = with_correction(denoise, correct_x0)",
        "pass",
        "After inpainting the known pixels are right, but along the edge of the mask there is a "
        "seam: what was drawn has nothing to do with the rest. Enlarged images are no better.",
        "The estimates are not corrected while the image is drawn: the known part is only pasted "
        "in at the end.",
    ),
    Fault(
        MODULE,
        "TextToImage.train",
        "self.autoencoder.eval()",
        "pass",
        "The text tower and the autoencoder are frozen. Yet with an autoencoder that has dropout, "
        "a step of training gives another loss each time it is computed for the same batch.",
        "The autoencoder follows the mode of the model instead of staying in evaluation mode.",
    ),
    Fault(
        MODULE,
        "TextToImage.first_state",
        "gaussian_noise(generators,",
        "gaussian_noise(generators[:1] * len(generators),",
        "The images of a batch resemble each other, whatever their seeds. Drawn one by one they "
        "differ.",
        "All rows take their noise from the first generator.",
    ),
)

QUESTIONS = [
    (
        "Which of the three models is trained in text-to-image, and why are the others frozen?",
        "The denoiser. The text tower already knows texts and the autoencoder images; training "
        "them too would move the contexts and the latents that the denoiser is learning.",
    ),
    (
        "Guidance 4 doubles the time of a sampling step. Why, and when does it not?",
        "Each step needs the prediction with the context and one without it. Guidance 1 is the "
        "plain conditional prediction, guidance 0 the unconditional one: one run each.",
    ),
    (
        "Guidance 8 gives images that are read as asked more often and vary less. Explain it.",
        "It extrapolates from the unconditional to the conditional prediction, so it raises "
        "p(context | x) to a power: samples move to where the context is most certain, and the "
        "rest of the distribution is lost.",
    ),
    (
        "Why does inpainting correct x_0 in each step, not only paste the known part at the end?",
        "The drawn part has to fit the known part. It only can if the denoiser sees the known part "
        "while it draws.",
    ),
    (
        "Of 50 steps an image-to-image edit with strength 0.6 takes how many? From where?",
        "30: it starts at x = alpha z + sigma eps of the 31st state from the end, where z is the "
        "latent of the image.",
    ),
    (
        "Why does super-resolution add E(matched) - E(drawn) to x_0 instead of using E(matched)?",
        "Encoding what was decoded does not give x_0 back exactly. In the difference this error "
        "cancels, so an estimate that fits already stays as it is.",
    ),
]
