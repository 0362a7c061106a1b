"""The order of images: one aspect a batch, cheap to skip, seeds that do not change."""

from detectron2.data.samplers import TrainingSampler

from ssim_kd.data.samplers import aspect_groups, batch_order, sample_seed


def test_batch_order_skips_a_long_run():
    records = [{"width": 4 + i % 3, "height": 5} for i in range(1000)]
    orders = [
        batch_order(
            TrainingSampler(1000, seed=1), 16, groups=aspect_groups(records), start_iter=start
        )
        for start in (0, 5000)
    ]
    for _ in range(5000):
        next(orders[0])
    assert [next(orders[0]) for _ in range(3)] == [next(orders[1]) for _ in range(3)]


def test_aspect_groups():
    sizes = ((4, 3), (3, 4), (3, 3))
    assert aspect_groups([{"width": w, "height": h} for w, h in sizes]).tolist() == [0, 1, 1]


def test_aspect_groups_without_sizes(caplog):
    assert aspect_groups([{"width": 3, "height": 4}, {"height": 3}]) is None
    assert "ASPECT_RATIO_GROUPING" in caplog.text


def test_sample_seed_fixed_and_distinct():
    assert sample_seed(5, 0) == 16823399
    seeds = {sample_seed(a, b, c) for a in range(5) for b in range(50) for c in range(3)}
    assert len(seeds) == 750
