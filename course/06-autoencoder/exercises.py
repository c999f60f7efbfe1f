from course.lessons import Exercise

TITLE = "Autoencoder and VAE"
NEEDS = (3,)
MODULE = "tinyfm/autoencoder.py"
EXERCISES = (
    Exercise(
        "reparameterise",
        MODULE,
        1,
        "logvar is ln var; the noise is scaled by the standard deviation. Draw nothing here.",
    ),
    Exercise(
        "kl_divergence",
        MODULE,
        1,
        "The page derives it. Return one KL for each element: sum nothing.",
    ),
    Exercise(
        "count_active",
        MODULE,
        1,
        "Tensor.var has an argument `correction`. The variance is over pictures, not places.",
    ),
    Exercise(
        "Autoencoder.restore",
        MODULE,
        1,
        "Solve the line of standardise, z' = (z - latent_mean) latent_scale, for z.",
    ),
    Exercise(
        "Autoencoder.encode",
        MODULE,
        2,
        "check_images, then self.encoder, then self.config.variational decides what its channels "
        "mean. Tensor.chunk cuts channels.",
    ),
    Exercise(
        "Autoencoder.measure_latents",
        MODULE,
        2,
        "Keep three running sums over batches: of numbers, of z, of z^2. Then set the two buffers "
        "with copy_.",
    ),
    Exercise(
        "Autoencoder.loss",
        MODULE,
        3,
        "encode, draw z, decode; two sums over a picture, each divided by the number of pictures. "
        "The three functions that you wrote before do most of it.",
    ),
)
