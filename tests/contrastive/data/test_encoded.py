from contrastive.data.encoded import FileImages
from contrastive.data.images import fingerprint


def test_images_of_another_white_are_others_for_caches_and_results(deep):
    images = FileImages(deep, [b"a.png"], 4)
    prints = images.fingerprint(), images.revision()
    assert prints[0] == fingerprint([("a.png", images.content(0))])  # as before there was a white
    assert prints[1] == fingerprint([("a.png", images.version(0))])
    images.white = 4095
    assert images.fingerprint() != prints[0]
    assert images.revision() != prints[1]
