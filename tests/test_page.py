"""The page of runs, `al_report.py html`: what it says, and how it stands in a real browser."""
import html.parser
import json
import os.path as osp
import re

import numpy as np
import pytest
import tiny
from PIL import Image
from test_reports import CELL, make_state, write_state

import al_report
from al_report import STATE_FILE, bars_of, data_uris, main

BAD = '<script>alert(1)</script>"><img src=//x.example/y onerror=alert(2)>'
CLASSES = ['road & "kerb"', BAD, "{{ 7 * 7 }} $\\frac$ ' </style>", 'סוס \u202e\x01']


class Text(html.parser.HTMLParser):
    """What a page says, and its tags: name -> attributes of each."""

    def __init__(self, page: str):
        super().__init__()
        self.words, self.tags = [], {}
        self.feed(page)
        self.text = ' '.join(' '.join(self.words).split())

    def handle_data(self, data):
        self.words.append(data)

    def handle_starttag(self, tag, attributes):
        self.tags.setdefault(tag, []).append(dict(attributes))


def write_run(folder, rounds: int = 3, seed: int = 0, **settings) -> str:
    """A run with all that a page may show, and names that nobody should have."""
    shares = [10 * k for k in range(1, rounds + 1)]
    state = make_state(shares, [40. + k for k in range(rounds)], seed, **settings)
    state['classes'] = CLASSES
    state['rounds'][1]['warnings'] = [f'beware of {BAD}']
    for k, entry in enumerate(state['rounds']):
        entry['asked'] = {f'{k}/{BAD}': None, f'{k}/plain': None}
        entry.update(pixels=1000, void_pixels=100, strategy=dict(type='random' if k == 0 else 'entropy', mc=1))
    path = write_state(folder, state)
    picture = np.tile(np.arange(600, dtype=np.uint8)[:, None], (40, 1, 3))
    for k in range(rounds):
        (folder / f'round_{k}' / 'pictures' / 'a').mkdir(parents=True)
        for name, content in {'asked_classes.json': [600, 200, 100, 0], 'class_iou.json': {CLASSES[0]: 90. + k},
                              'query_scores.json': {f'{k + 1}/{BAD}': 4., f'{k + 1}/plain': 2., 'rest': 0.}}.items():
            (folder / f'round_{k}' / name).write_text(json.dumps(content))
        for name in ('contact_sheet.png', f'pictures/{k}/plain.png', f'pictures/a/{k}"<b>.png') if k else ():
            (folder / f'round_{k}' / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f'round_{k}' / name)
    (folder / 'palette.json').write_text(json.dumps(dict(zip(CLASSES, [0xff0000, 0x10ff]))))
    return path


@pytest.fixture
def page(tmp_path):
    """A function that writes the page of some runs and returns its path."""

    def write(*dirs: str, options: tuple = ()) -> str:
        main(['html', *dirs, '-o', str(tmp_path / 'page.html'), *options])
        return str(tmp_path / 'page.html')

    return write


def read(path: str) -> Text:
    with open(path, encoding='utf-8') as file:
        return Text(file.read())


# --- what it says ----------------------------------------------------------------------------------------------------


def test_figures_of_a_run_by_hand(tmp_path, page):
    said = read(page(write_run(tmp_path / 'a'), options=('--full', '84')))
    for words in ('mIoU 42.00 with labels of 30 % of images since round 0 +2.00 of full supervision 50.0 %',
                  'Ended after round 2: 2 of 2 rounds of queries are done', f'Warning in round 1: beware of {BAD}',
                  'Round 2 2 images, by entropy', 'Round 0 2 images, by random', 'Scores of 3 images',
                  f'{CLASSES[0]} 60.00 {BAD} 20.00', 'void 10.00', f'{CLASSES[0]} 90 91 92',
                  f'2/{BAD} all all 4 2/plain all all 2', f'{tmp_path}/a --resume', '@misc{mmseg2020,'):
        assert words in said.text, words
    assert 'al.visualize' not in said.text
    assert [image['alt'] for image in said.tags['img']] == [
        name for k in (2, 1) for name in ('contact_sheet.png', f'pictures/{k}/plain.png', f'pictures/a/{k}"<b>.png')]
    styles = [tag.get('style', '') for tag in said.tags['i'] + said.tags['span']]
    assert any('width: 60.0%; background: #ff0000' in style for style in styles)
    assert {'background: #ff0000', f'background: {al_report.COLOURS[0]}'} <= {*styles}


def test_runs_side_by_side(tmp_path, page):
    """As `compare` has them: seeds averaged, full supervision not a curve; each in its group's colour."""
    dirs = [write_run(tmp_path / 'a'), write_run(tmp_path / 'b', seed=1),
            write_run(tmp_path / 'c', strategy='random'), write_state(tmp_path / 'full', make_state(
                [100], [70], initial=1.))]
    said = read(page(*dirs))
    assert said.text.count('With al.visualize=8 there are pictures, too') == 1  # of the run that has none
    assert 'entropy (2 seeds)' in said.text and 'full supervision: 70.00' in said.text
    assert 'entropy 2 3 10 to 30 42.00 ± 0.00 41.00 ± 0.00' in said.text
    dots = [tag['style'].split(': ')[1] for tag in said.tags['span'] if tag.get('class') == 'dot']
    blue, grey = al_report.COLOURS[0], 'var(--soft)'
    assert dots == [blue, blue, grey, blue, grey, blue, blue, grey]  # chips, table, headings
    assert [link['href'] for link in said.tags['a'][1:]] == ['#run-1', '#run-2', '#run-3', '#run-4']


def test_names_stay_words(tmp_path, page):
    """Whatever they hold: the page has no script, and no tag or attribute of theirs."""
    said = read(page(write_run(tmp_path / BAD.replace('/', '|'))))
    assert 'script' not in said.tags and said.text.count('alert(1)') > 9
    assert all(image['src'].startswith('data:') and 'onerror' not in image for image in said.tags['img'])
    assert '{{ 7 * 7 }}' in said.text and said.tags['title'] == [{}] and len(said.tags['style']) == 1


def test_what_is_not_there_is_left_out(tmp_path, capsys):
    """A run before its first training, damaged files, and no pictures. Without --out the page stands in the run."""
    state = make_state([10], [40], rounds=2, phase='train')
    del state['rounds'][0]['metrics']
    path = write_state(tmp_path / 'run', state)
    (tmp_path / 'run' / 'round_0' / 'pictures').mkdir(parents=True)
    for name, content in {'palette.json': '{"a": null}', 'round_0/asked_classes.json': '{"b": 1}',
                          'round_0/class_iou.json': '{"c": NaN}', 'round_0/pictures/a.png': 'no picture'}.items():
        (tmp_path / 'run' / name).write_text(content)
    main(['html', path])
    assert capsys.readouterr().out.startswith(f'{path}/report.html: 1 runs, 0 pictures, 0.0 MB')
    said = read(osp.join(path, 'report.html'))
    assert 'Round 0 of 2: training on what is labelled' in said.text and 'svg' not in said.tags
    assert not {'img', 'dd', 'i'} & said.tags.keys()


@pytest.mark.parametrize('options, error', [
    (['html', 'nowhere'], 'nowhere should be the --work-dir of a run, but there is no al_state.json'),
    (['html', '{run}', '-o', '{run}'], r'--out should be a file, e\.g\. .*/report')])
def test_an_error_writes_nothing(tmp_path, capsys, options, error):
    run = write_state(tmp_path / 'run', make_state([10, 20], [40, 60]))
    with pytest.raises(SystemExit, match='^2$'):
        main([option.format(run=run) for option in options])
    assert re.search(error, capsys.readouterr().err)
    assert [file.name for file in (tmp_path / 'run').iterdir()] == [STATE_FILE]


def test_bars_by_hand():
    bars = bars_of({'a': 0., 'b': .1, 'c': 1., 'd': 2.}, {'b': None, 'd': None}, bins=4)
    assert bars == dict(low=0, high=2, images=4, bars=[(100, 50), (0, 0), (50, 0), (50, 100)])
    assert bars_of({'a': 1.}, {}) is None


def test_pictures_fit_the_page(tmp_path, capsys):
    """The more, the smaller: of noise, which nothing makes small."""
    paths = [str(tmp_path / f'{i}.png') for i in range(4)]
    for i, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (300, 400, 3), np.uint8)).save(path)
    one = data_uris(paths[:1])[paths[0]]
    assert capsys.readouterr().err == '' and (tmp_path / '0.png').stat().st_size > len(one) > 50_000
    few = data_uris(paths, limit=len(one))
    assert sum(map(len, few.values())) <= len(one) and list(few) == paths
    assert '4 pictures are too many at 1100 pixels' in capsys.readouterr().err


def test_the_page_of_a_run(make_cfg, train, capsys):
    """It shows what a round asks for, in pictures and in classes of the data set's colours, and what it waits for."""
    cfg = make_cfg(dict(unit=CELL, oracle='human', initial=tiny.NAMES[:4], budget=3, visualize=2))
    _, rounds = train(cfg)
    main(['html', cfg.work_dir])
    pictures = 1 + 2 + len(rounds[1]['asked'])  # asked.png, of the query, and for those who label
    assert f'report.html: 1 runs, {pictures} pictures' in capsys.readouterr().out
    said = read(osp.join(cfg.work_dir, 'report.html'))
    assert 'Round 1 of 1: waiting for the labels that to_label/ in its folder asks for' in said.text
    assert {'background: #5a5a5a', 'background: #c8c8c8'} <= {tag.get('style') for tag in said.tags['span']}


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    if not tiny.Browser.PATH:
        pytest.skip('there is no Chromium here (Debian: apt-get install chromium)')
    browser = tiny.Browser(tmp_path_factory.mktemp('browser'))
    yield browser
    browser.close()


@pytest.fixture
def ten_rounds(tmp_path, page):
    return page(write_run(tmp_path / 'ten', 10), write_run(tmp_path / 'other', 3, strategy='random'))


@pytest.mark.parametrize('width, scheme', [(1280, 'light'), (390, 'dark')])
def test_a_browser_shows_it(ten_rounds, browser, width, scheme):
    """All of it, and nothing from elsewhere; no wider than a phone; words stand out from their background."""
    browser.open(ten_rounds, width, scheme=scheme)
    shown = browser.run('''(async () => {
        for (const details of document.querySelectorAll('details')) details.open = true;
        await Promise.all([...document.images].map(image => image.decode()));
        return {images: [...document.images].map(image => image.naturalWidth), scripts: document.scripts.length,
                text: document.body.innerText, wide: document.documentElement.scrollWidth,
                title: document.title, svg: document.querySelector('svg').getBoundingClientRect().height,
                colours: ['body', '.soft', 'svg text', 'th', 'pre'].map(
                    name => getComputedStyle(document.querySelector(name))[name == 'svg text' ? 'fill' : 'color']),
                back: getComputedStyle(document.body).backgroundColor} })()''')
    assert shown['images'] == [600] * 33 and shown['scripts'] == 0 and shown['svg'] > 200
    assert shown['wide'] <= width and BAD in shown['text'] and shown['title'] == 'Active learning: ten, other'
    names = [name for name, _ in browser.told]
    assert not {'Runtime.consoleAPICalled', 'Runtime.exceptionThrown', 'Log.entryAdded', 'Network.loadingFailed',
                'Page.javascriptDialogOpening'} & {*names}, browser.told
    asked = {params['request']['url'][:15] for name, params in browser.told if name == 'Network.requestWillBeSent'}
    assert asked == {f'file://{ten_rounds}'[:15], 'data:image/webp'}
    rgb = [np.array([int(part) for part in colour[4:-1].split(',')]) for colour in [*shown['colours'], shown['back']]]
    light = [float(np.where(c <= 10, c / 3295, ((c / 255 + .055) / 1.055)**2.4) @ [.2126, .7152, .0722]) for c in rgb]
    assert (light[-1] > .5) == (scheme == 'light')
    assert all((max(each, light[-1]) + .05) / (min(each, light[-1]) + .05) >= 4.5 for each in light[:-1])
    assert osp.getsize(ten_rounds) < 10_000_000


def test_a_browser_refuses_what_comes_from_elsewhere(ten_rounds, browser, tmp_path):
    """The page itself forbids it, should something ever get into it: this is the check that the one above can fail."""
    with open(ten_rounds, encoding='utf-8') as file:
        (tmp_path / 'worse.html').write_text(file.read().replace(
            '</main>', '<script>document.title = "ran"</script><img src="x.png"></main>'))
    browser.open(tmp_path / 'worse.html')
    assert browser.run('document.title') == 'Active learning: ten, other'
    assert sum(name == 'Log.entryAdded' for name, _ in browser.told) >= 2


def test_it_is_used_by_keyboard(ten_rounds, browser):
    """Every round opens, every table scrolls, every picture grows; the first key leads past the head."""
    browser.open(ten_rounds, 390)
    browser.press('Tab', 9)
    assert browser.run('document.activeElement.textContent') == 'To the content'
    browser.press('Enter', 13)
    assert browser.run('location.hash') == '#main'
    closed = browser.run('[...document.querySelectorAll("section > details")].filter(each => !each.open).length')
    seen = set()
    for _ in range(80):
        browser.press('Tab', 9)
        here = browser.run('''(() => { const e = document.activeElement; return [e.tagName, e.className,
            e.parentElement && e.parentElement.open, getComputedStyle(e).outlineStyle] })()''')
        seen.add(here[0] + '.' + here[1])
        assert here[0] == 'BODY' or here[3] == 'solid', here  # it is seen where one is
        if here[0] == 'SUMMARY' and not here[2]:
            browser.press('Enter', 13)
    assert {'SUMMARY.', 'DIV.scroll', 'DIV.', 'PRE.'} <= seen
    assert browser.run('[...document.querySelectorAll("section > details")].filter(e => !e.open).length') < closed
    before, after = browser.run('''(async () => {
        const frame = document.querySelector('details[open] figure div'), image = frame.firstElementChild;
        document.activeElement.blur(); await image.decode(); const before = image.width; frame.focus();
        return [before, image.width] })()''')
    assert before < 390 and after == 600
