"""Pre-activations on which a selection goes wrong if it can."""

import torch


def cases(B: int = 4, F: int = 75) -> dict[str, torch.Tensor]:
    """Float32 matrices ``[B, F]`` by name; ``F`` is no multiple of the group size."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(B, F, generator=generator)
    ramp = torch.arange(B * F, dtype=torch.float32).view(B, F) - B * F / 4
    made = {
        "random": normal,
        "all_equal": torch.full((B, F), 1.5),
        "two_values": (normal > 0).float() + 1,
        "few_values": torch.randint(-2, 3, (B, F), generator=generator).float(),
        "all_negative": -normal.abs() - 1,
        "all_zero": torch.zeros(B, F),
        "one_positive": -normal.abs(),
        "hot_token": normal.clone(),
        "hot_latent": normal.clone(),
        "ascending": ramp,
        "descending": ramp.flip(0, 1),
        "denormal": normal * 1e-40,
        "signed_zero": torch.where(normal > 0, 0.0, -0.0),
        "infinite": normal.clone(),
        "nan": normal.clone(),
        "all_nan": torch.full((B, F), torch.nan),
        "nan_and_ties": torch.randint(-1, 2, (B, F), generator=generator).float(),
        "wide_range": torch.exp(30 * normal) * normal.sign(),
    }
    made["one_positive"][B // 2, F - 1] = 3.0
    made["hot_token"][B // 2] += 100
    made["hot_latent"][:, F // 2] += 100
    made["infinite"].view(-1)[:: F // 4] = torch.inf
    made["infinite"].view(-1)[1 :: F // 4] = -torch.inf
    made["nan"].view(-1)[::5] = torch.nan
    made["nan_and_ties"].view(-1)[::3] = torch.nan
    return made
