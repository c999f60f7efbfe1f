"""For teachers: wrong answers that the checks must find, bugs to plant, and exam questions."""

from course.lessons import Fault, Wrong

WRONG = {
    "reparameterise": (
        Wrong("logvar / 2", "logvar", "the noise is scaled by the variance, not its root"),
        Wrong("torch.exp(logvar / 2)", "logvar / 2", "ln of the deviation is not the deviation"),
        Wrong("* eps", "* torch.randn_like(mean)", "the noise that was given is not used"),
        Wrong("torch.exp(logvar / 2)", "torch.exp(logvar / 2).detach()", "no gradient for logvar"),
    ),
    "kl_divergence": (
        Wrong(" / 2", "", "twice the KL"),
        Wrong("mean.square()", "mean.abs()", "the mean enters as its square"),
        Wrong("- logvar", "+ logvar", "the entropy of q has the wrong sign"),
        Wrong("logvar.exp()", "(logvar / 2).exp()", "the variance, not the deviation, enters"),
    ),
    "count_active": (
        Wrong("correction=0", "correction=1", "the variance is divided by n - 1"),
        Wrong("dim=0", "dim=1", "the variance is over channels instead of pictures"),
        Wrong(
            "means.var(dim=0, correction=0)",
            "means.square().mean(dim=0)",
            "a constant mean counts as active",
        ),
        Wrong("> ACTIVE", "< ACTIVE", "counts the latents that are not active"),
    ),
    "Autoencoder.restore": (
        Wrong("z / self.latent_scale", "z * self.latent_scale", "scaled the same way twice"),
        Wrong("+ self.latent_mean", "- self.latent_mean", "the mean is taken away twice"),
        Wrong(
            "z / self.latent_scale + self.latent_mean",
            "(z + self.latent_mean) / self.latent_scale",
            "inverted in the wrong order",
        ),
    ),
    "Autoencoder.encode": (
        Wrong("mean, logvar = moments", "logvar, mean = moments", "the halves are swapped"),
        Wrong("dim=1", "dim=0", "cuts the batch in half instead of the channels"),
        Wrong(".clamp(*LOGVAR_RANGE)", "", "ln var is not limited"),
        Wrong("LOGVAR_RANGE[0]", "0.0", "a plain autoencoder with variance 1"),
    ),
    "Autoencoder.measure_latents": (
        Wrong(" + logvar.exp()", "", "the variance of each draw is forgotten"),
        Wrong("** -0.5", "** 0.5", "the deviation instead of 1 / deviation"),
        Wrong("- (total / count) ** 2", "", "E z^2 instead of the variance"),
        Wrong("mean.numel()", "len(mean)", "counts pictures instead of latents"),
        Wrong("x.double()", "x", "float32 sums lose the variance beside a large mean"),
    ),
    "Autoencoder.loss": (
        Wrong(".square().sum() / (2 * len(mean))", ".square().mean()", "a mean over pixels"),
        Wrong("kl_divergence(mean, logvar).sum() / len(mean)", "kl_divergence(mean, logvar).mean()",
              "a mean over latents"),
        Wrong("z = reparameterise(mean, logvar, eps.to(mean.device))", "z = mean", "no noise"),
        Wrong("reconstruction + beta * kl", "reconstruction - beta * kl", "the KL is rewarded"),
        Wrong(".clamp(max=1)", "", "beta rises for ever"),
    ),
}  # fmt: skip

FAULTS = (
    Fault(
        "tinyfm/autoencoder.py",
        "Upsample.forward",
        ".flip(2, 3)",
        "",
        "Models that were trained with this copy reconstruct well. But with the weights of an "
        "autoencoder that was trained elsewhere, reconstructions are ragged, although its encoder "
        "gives the right latents.",
        "The transposed convolution needs the kernel flipped. Without it every layer Upsample "
        "convolves with a mirrored kernel: training here simply learns the mirror image, but "
        "weights from elsewhere were learned for the other one. Compare the layer with "
        "F.interpolate and F.conv2d on one random input.",
    ),
    Fault(
        "tinyfm/autoencoder.py",
        "Autoencoder.loss",
        "generator=g) for g in generators]",
        "generator=generators[0]) for _ in generators]",
        "The loss of a picture is not the same when it stands alone and when it is the second of "
        "a batch, with its own generator of the same seed both times.",
        "All rows draw from the first generator, so a row's noise depends on its place in the "
        "batch. Runs with other micro-batches or more processes then give other losses.",
    ),
    Fault(
        "tinyfm/autoencoder.py",
        "Autoencoder.encode",
        "logvar.clamp(*LOGVAR_RANGE)",
        "logvar.clamp(0.0, LOGVAR_RANGE[1])",
        "Even with beta 0.0001, a model learns slowly, its means grow large, and the KL never "
        "shows a variance below 1.",
        "ln var is clamped to 0 or more, so the noise never has a deviation below 1. The only way "
        "to send more is to spread the means far apart.",
    ),
    Fault(
        "tinyfm/autoencoder.py",
        "Autoencoder.measure_latents",
        " + logvar.exp()",
        "",
        "With a large beta, standardised latents that were drawn with noise have a variance well "
        "above 1; with a plain autoencoder, all is well.",
        "The variance of the draw itself is missing in E z^2 = mean^2 + var. A plain autoencoder "
        "has almost none, so nothing shows there.",
    ),
)

QUESTIONS = [
    (
        "Why can the encoder not simply be trained through a sampled z without the "
        "reparameterisation?",
        "A sample has no derivative with respect to the parameters of its distribution. Written as "
        "mean + deviation eps, the randomness is an input, and z is a differentiable function of "
        "mean and ln var.",
    ),
    (
        "The ELBO is a lower bound of ln p(x). What is the gap, and when is it 0?",
        "KL(q(z|x) || p(z|x)). It is 0 if q is the exact posterior.",
    ),
    (
        "A latent has mean 0 and variance 1 for every picture. What is its KL, and what does the "
        "decoder learn from it?",
        "0, and nothing: it is pure noise. The latent is switched off (posterior collapse).",
    ),
    (
        "A pixel has variance 9 over the data; beta is 1. Give the KL and half the squared error "
        "of the best linear code. And at variance 0.5?",
        "KL = ln(9) / 2 = 1.10 nats and beta / 2 = 0.5. As 0.5 < beta, the latent is then off: "
        "KL 0, and half the squared error is 0.25.",
    ),
    (
        "A student averages the squared error over pixels but sums the KL over latents. What do "
        "they see with 32 x 32 pictures?",
        "The reconstruction counts 1/1024 as much, as if beta were 1024 times larger. The "
        "latents are switched off, and all reconstructions are one mean picture.",
    ),
    (
        "Why does a diffusion model on latents need latent_mean and latent_scale?",
        "Its noise has variance 1, and its schedule assumes a signal of variance 1. Latents of "
        "another scale would drown in the noise at once, or hardly change.",
    ),
]
