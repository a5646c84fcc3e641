/* A window of a JPEG file as RGB pixels: one function on libjpeg-turbo, called through ctypes by window_decoder.py.

   Every block up to the window's last row is Huffman-decoded (a JPEG has no other way in); transform, upsampling and
   color conversion are done for the window alone, and nothing after its last row is decoded. No state outlives a call,
   so calls may run in many threads at once. Nothing here prints, exits or aborts. */

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>

#define MARGIN 4 /* columns beyond the window that smooth chroma upsampling reads: 1 chroma sample of 1 or 2 pixels */
#define ROWS 16  /* rows asked for at a time */
#define MAX_SCANS 100 /* as in jpeg.py */

enum { DECODED, LEFT_TO_OTHERS = 2, HAS_APP1 };

struct trouble {
  struct jpeg_error_mgr manager; /* first, because libjpeg hands back its address */
  jmp_buf escape;
  char *message;
};

static void give_up(j_common_ptr info) {
  longjmp(((struct trouble *)info->err)->escape, 1);
}

/* What is missing libjpeg fills in, as for PIL; its first words about that are kept. Only where the data ends before its
   end-of-image marker PIL sees an error. */
static void on_warning(j_common_ptr info, int level) {
  if (level >= 0) return;
  switch (info->err->msg_code) {
    case JWRN_JPEG_EOF:
      give_up(info);
    case JWRN_EXTRANEOUS_DATA: /* these are about oddities of whole data */
    case JWRN_ADOBE_XFORM:
    case JWRN_BOGUS_ICC:
    case JWRN_BOGUS_PROGRESSION:
    case JWRN_JFIF_MAJOR:
    case JWRN_NOT_SEQUENTIAL:
      return;
  }
  if (!info->err->num_warnings++) info->err->format_message(info, ((struct trouble *)info->err)->message);
}

/* Neither a stuffed zero nor a fill byte nor a restart. */
static int is_marker(uint8_t code) { return code != 0 && code != 0xFF && (code < 0xD0 || code > 0xD7); }

enum { UNSURE = 1, HAS_EXIF = 2, EXIF_UPRIGHT = 4, ELSEWHERE = 8 }; /* what APP1 segments say of the orientation */

/* Adds what an APP1 segment (its length first) says: of Exif the first directory counts, of other text the word. */
static int app1_says(const uint8_t *segment, size_t length, int before) {
  if (length < 16 || memcmp(segment + 2, "Exif\0", 6)) {
    for (size_t k = 2; k + 11 <= length; k++)
      if (!memcmp(segment + k, "Orientation", 11)) return before | ELSEWHERE;
    return before;
  }
  const uint8_t *tiff = segment + 8;
  size_t size = length - 8, big = tiff[0] == 'M';
  if (before & HAS_EXIF || (memcmp(tiff, "II*\0", 4) && memcmp(tiff, "MM\0*", 4))) return before | UNSURE;
#define SHORT(at) ((size_t)tiff[(at) + !big] << 8 | tiff[(at) + big])
  size_t at = big ? SHORT(4) << 16 | SHORT(6) : SHORT(6) << 16 | SHORT(4);
  size_t entries = at + 2 <= size ? SHORT(at) : size;
  if (at < 8 || at + 2 + 12 * entries > size) return before | UNSURE;
  for (at += 2; entries--; at += 12)
    if (SHORT(at) == 0x0112) {
      size_t ones = big ? SHORT(at + 6) : SHORT(at + 4), rest = big ? SHORT(at + 4) : SHORT(at + 6);
      before |= SHORT(at + 2) == 3 && ones == 1 && !rest && SHORT(at + 8) == 1 ? EXIF_UPRIGHT : UNSURE;
    }
#undef SHORT
  return before | HAS_EXIF;
}

/* Whether the file is whole, as scan in jpeg.py sees it, no bomb, and has no stray bytes before its pixels: a walk over
   its segments up to the end-of-image marker. What the segments say is left to libjpeg; late: some come behind the first
   scan. */
static int is_whole(const uint8_t *data, size_t size, int *orientation, int *late) {
  size_t at = 2;
  int scans = 0;
  if (size < 2 || data[0] != 0xFF || data[1] != 0xD8) return 0;
  for (;;) {
    for (;; at++) {
      const uint8_t *found = at + 1 < size ? memchr(data + at, 0xFF, size - 1 - at) : NULL;
      if (!found || (found != data + at && !scans)) return 0;
      at = (size_t)(found - data);
      if (is_marker(data[at + 1])) break;
    }
    uint8_t code = data[at + 1];
    at += 2;
    if (code == 0xD9) return 1;
    *late |= scans > 0;
    if (code == 0x01 || code == 0xD8) continue;
    size_t length = at + 1 < size ? (size_t)data[at] << 8 | data[at + 1] : 2;
    if (length < 2 || at + length > size) return 0;
    if (code == 0xE1) *orientation = scans ? UNSURE : app1_says(data + at, length, *orientation);
    if (code == 0xDA && ++scans > MAX_SCANS) return 0;
    at += length;
  }
}

/* Arguments:
     data, size: the JPEG file.
     height, width: of the image, as the caller expects it.
     as_stored: 0 where the image must be shown upright; it is then left where APP1 segments (EXIF) may turn it.
     window: in: top, left, height, width of the wanted pixels, inside the image; out: of the pixels that were
       written: these rows, and at least these columns.
     out, capacity: where the pixels go, RGB, row after row; bytes that fit there.
     message: JMSG_LENGTH_MAX bytes, for libjpeg's first warning on the way to the window's last row; else empty.
   Returns DECODED; LEFT_TO_OTHERS (not whole, not as expected, or a rare kind of JPEG); HAS_APP1. */
int fastssl_decode_window(const uint8_t *data, size_t size, int64_t height, int64_t width, int as_stored,
                          int64_t *window, uint8_t *out, size_t capacity, char *message) {
  struct jpeg_decompress_struct info;
  struct trouble trouble;
  int said = 0, late = 0;
  if (!is_whole(data, size, &said, &late)) return LEFT_TO_OTHERS;
  if (!as_stored && (said & UNSURE || (said & ELSEWHERE && !(said & EXIF_UPRIGHT)))) return HAS_APP1;

  info.err = jpeg_std_error(&trouble.manager);
  trouble.manager.error_exit = give_up;
  trouble.manager.emit_message = on_warning;
  trouble.message = message;
  message[0] = 0;
  info.mem = NULL; /* for jpeg_destroy, should creation itself fail */
  if (setjmp(trouble.escape)) {
    jpeg_destroy_decompress(&info);
    return LEFT_TO_OTHERS;
  }
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, (unsigned char *)data, (unsigned long)size);
  jpeg_read_header(&info, TRUE);
  int known = info.jpeg_color_space == JCS_YCbCr || info.jpeg_color_space == JCS_GRAYSCALE ||
              info.jpeg_color_space == JCS_RGB;
  /* PIL reads what comes behind a single scan too, and may find damage there; of several scans all is read here. */
  if (late && !jpeg_has_multiple_scans(&info)) give_up((j_common_ptr)&info);
  if (!known || info.image_height != height || info.image_width != width) give_up((j_common_ptr)&info);
  info.out_color_space = JCS_RGB;
  info.dct_method = JDCT_ISLOW;
  info.do_fancy_upsampling = TRUE;
  jpeg_start_decompress(&info);

  int64_t top = window[0], left = window[1], bottom = top + window[2], right = left + window[3];
  if (top < 0 || left < 0 || bottom <= top || right <= left || bottom > height || right > width)
    give_up((j_common_ptr)&info);
  int64_t first = left > MARGIN ? left - MARGIN : 0, last = right + MARGIN < width ? right + MARGIN : width;
  JDIMENSION offset = (JDIMENSION)first, columns = (JDIMENSION)(last - first);
  if (columns < info.output_width) jpeg_crop_scanline(&info, &offset, &columns); /* widens to whole blocks */
  size_t stride = (size_t)columns * 3;
  if ((size_t)window[2] * stride > capacity) give_up((j_common_ptr)&info);
  window[1] = offset;
  window[3] = columns;
  if (top > 0) jpeg_skip_scanlines(&info, (JDIMENSION)top);
  while (info.output_scanline < bottom) {
    JSAMPROW rows[ROWS];
    JDIMENSION count = 0;
    for (int64_t y = info.output_scanline; y < bottom && count < ROWS; y++) rows[count++] = out + (y - top) * stride;
    if (!jpeg_read_scanlines(&info, rows, count)) give_up((j_common_ptr)&info);
  }
  jpeg_destroy_decompress(&info);
  return DECODED;
}
