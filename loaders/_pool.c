/* Threads that fill whole batches: read, decode (_window.c) and cut (resample.py, by the address of its compiled code).
   Called through ctypes by batch_pool.py: one call per batch, which waits without Python's lock.

   Batches are worked on in the order in which they came, by all threads together, row by row; a row's part maps are
   read along with it. A row that is not a usual JPEG or RGB pixels, or not as promised, gets another status than DECODED
   and is left to the caller, which then finds out what is wrong. The threads take no signals. After a fork the child has
   the pool but not its threads: its calls do nothing. */

#ifdef __linux__
#define _GNU_SOURCE /* for the threads' names */
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SLACK 64             /* columns that fastssl_decode_window may write beside the window */
#define MAX_PIXELS (1 << 27) /* as in decode.py */
#define MAX_BYTES (1 << 30)
#define SQUASH_KIND 1        /* bilinear */
#define MESSAGE_BYTES 200
#define KEPT_BYTES (64 << 20) /* a thread gives larger buffers back after their row */

enum { DECODED, LEFT_TO_OTHERS = 2, NOT_DONE = 255 };
enum { UNKNOWN, JPEG, RAW, FILE_BY_NAME, FILE_AT }; /* where a row's bytes lie: decode.py, Places */

int fastssl_decode_window(const uint8_t *data, size_t size, int64_t height, int64_t width, int as_stored,
                          int64_t *window, uint8_t *out, size_t capacity, char *message);

/* Crops of one image, as cut_all and squash in resample.py make them; bad: -1 once it is done. */
typedef void cut_function(const uint8_t *frame, int64_t stride, int64_t height, int64_t width, int64_t top,
                          int64_t left, const int64_t *boxes, const uint8_t *flips, int64_t count, int64_t size,
                          int64_t kind, int64_t planar, uint8_t *out, int64_t *bad);

struct row { /* Integers as in a row of an int64 array; parts_file and parts_begin: where its part maps lie; crc32: not
                negative where the checksum of an image's bytes is to be filled in. */
  int64_t kind, file, begin, size, height, width, parts_file, parts_begin, crc32;
};

struct group { /* Likewise: addresses of the first row's boxes, flips and crops, then numbers. */
  int64_t boxes, flips, out, count, size, kind, squash;
};

struct job {
  struct row *row;
  const struct group *group;
  int64_t rows, groups, part_bytes, next, done, busy;
  uint8_t *parts, *status;
  struct job *after;
};

struct pool {
  pthread_mutex_t lock, joining;
  pthread_cond_t work, finished;
  struct job *first, *last; /* that have rows left */
  int stopping, count;
  pid_t process;
  cut_function *cut;
  pthread_t threads[];
};

struct buffer {
  uint8_t *bytes;
  size_t size;
};

struct worker {
  struct buffer data, pixels, *squares;
  int64_t num_squares;
};

static uint8_t *room(struct buffer *buffer, size_t size) {
  if (size > buffer->size) {
    free(buffer->bytes);
    buffer->bytes = malloc(size);
    buffer->size = buffer->bytes ? size : 0;
  }
  return buffer->bytes;
}

static void trim(struct buffer *buffer, size_t kept) {
  if (buffer->size <= kept) return;
  free(buffer->bytes);
  *buffer = (struct buffer){NULL, 0};
}

/* Whether `size` bytes could be read. */
static int read_at(int file, uint8_t *bytes, int64_t size, int64_t begin) {
  while (size > 0) {
    ssize_t got = pread(file, bytes, (size_t)size, (off_t)begin);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return 0;
    bytes += got, begin += got, size -= got;
  }
  return 1;
}

/* The bytes of a file; NULL where it cannot be read or is no JPEG, of which only the beginning is read. */
static uint8_t *read_file(struct buffer *buffer, const char *path, int64_t *size) {
  int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe would wait for its writer */
  if (file < 0) return NULL;
  struct stat facts;
  uint8_t *bytes = NULL;
  if (!fstat(file, &facts) && S_ISREG(facts.st_mode) && facts.st_size > 0 && facts.st_size <= MAX_BYTES) {
    bytes = room(buffer, (size_t)facts.st_size);
    int64_t first = facts.st_size < 2 ? facts.st_size : 2;
    if (bytes && (!read_at(file, bytes, first, 0) || bytes[0] != 0xFF || bytes[first - 1] != 0xD8)) bytes = NULL;
    if (bytes && !read_at(file, bytes + first, facts.st_size - first, first)) bytes = NULL;
    *size = facts.st_size;
  }
  close(file);
  return bytes;
}

/* CRC-32 of zlib and others, by tables of eight bytes at a time; made once, by whoever starts the first pool. */
static uint32_t crc_table[8][256];

static void make_crc_table(void) {
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; bit++) value = value & 1 ? value >> 1 ^ 0xEDB88320u : value >> 1;
    crc_table[0][i] = value;
  }
  for (int k = 1; k < 8; k++)
    for (int i = 0; i < 256; i++)
      crc_table[k][i] = crc_table[k - 1][i] >> 8 ^ crc_table[0][crc_table[k - 1][i] & 255];
}

static uint32_t crc32_of(const uint8_t *data, int64_t size) {
  uint32_t value = ~0u;
  for (; size >= 8; size -= 8, data += 8) {
    uint32_t next = 0, low = value ^ (data[0] | data[1] << 8 | data[2] << 16 | (uint32_t)data[3] << 24);
    for (int k = 0; k < 4; k++) next ^= crc_table[7 - k][low >> 8 * k & 255] ^ crc_table[3 - k][data[4 + k]];
    value = next;
  }
  while (size--) value = value >> 8 ^ crc_table[0][(value ^ *data++) & 255];
  return ~value;
}

/* The smallest window (top, left, height, width) that holds all boxes of a row; all of the image where a group needs
   that. Whether it lies in the image. */
static int find_window(const struct job *job, int64_t row, int64_t *window) {
  int64_t height = job->row[row].height, width = job->row[row].width;
  int64_t top = height, left = width, bottom = 0, right = 0;
  for (int64_t g = 0; g < job->groups; g++) {
    const struct group *group = job->group + g;
    if (group->squash) top = left = 0, bottom = height, right = width;
    if (group->squash) continue;
    const int64_t *box = (const int64_t *)(intptr_t)group->boxes + row * group->count * 4;
    for (int64_t k = 0; k < group->count; k++, box += 4) {
      if (box[0] < top) top = box[0];
      if (box[1] < left) left = box[1];
      if (box[0] + box[2] > bottom) bottom = box[0] + box[2];
      if (box[1] + box[3] > right) right = box[1] + box[3];
    }
  }
  window[0] = top, window[1] = left, window[2] = bottom - top, window[3] = right - left;
  return top >= 0 && left >= 0 && top < bottom && left < right && bottom <= height && right <= width;
}

/* Crops of all groups from the pixels of a window. Whether all could be cut. */
static int cut_groups(struct pool *pool, struct worker *me, const struct job *job, int64_t row, const uint8_t *pixels,
                      const int64_t *window) {
  int64_t bad;
  for (int64_t g = 0; g < job->groups; g++) {
    const struct group *group = job->group + g;
    const int64_t *boxes = (const int64_t *)(intptr_t)group->boxes + row * group->count * 4;
    const uint8_t *flips = (const uint8_t *)(intptr_t)group->flips + row * group->count;
    uint8_t *out = (uint8_t *)(intptr_t)group->out + row * group->count * 3 * group->size * group->size;
    const uint8_t *frame = pixels;
    int64_t top = window[0], left = window[1], height = window[2], width = window[3], side = group->squash;
    if (side) {
      int64_t same = 0; /* the first group with such a frame, whose buffer holds it */
      while (job->group[same].squash != side) same++;
      uint8_t *square = room(me->squares + same, (size_t)(side * side * 3));
      if (!square) return 0;
      if (same == g) {
        const int64_t whole[4] = {0, 0, height, width};
        const uint8_t no_flip = bad = 0;
        pool->cut(pixels, width * 3, height, width, 0, 0, whole, &no_flip, 1, side, SQUASH_KIND, 0, square, &bad);
        if (bad >= 0) return 0;
      }
      frame = square, top = left = 0, height = width = side;
    }
    bad = 0;
    pool->cut(frame, width * 3, height, width, top, left, boxes, flips, group->count, group->size, group->kind, 1, out,
              &bad);
    if (bad >= 0) return 0;
  }
  return 1;
}

/* Fills the crops of a row and returns its status. */
static int fill(struct pool *pool, struct worker *me, const struct job *job, int64_t row) {
  struct row it = job->row[row];
  int64_t window[4];
  if (it.kind == UNKNOWN || it.height < 1 || it.width < 1 || it.height > MAX_PIXELS / it.width) return LEFT_TO_OTHERS;
  if (!find_window(job, row, window)) return LEFT_TO_OTHERS;
  uint8_t *parts = job->parts + row * job->part_bytes;
  if (job->part_bytes && !read_at((int)it.parts_file, parts, job->part_bytes, it.parts_begin)) return LEFT_TO_OTHERS;
  const uint8_t *pixels;
  if (it.kind == RAW) { /* whole rows of the window */
    int64_t stride = it.width * 3, size = window[2] * stride;
    uint8_t *data = it.size == it.height * stride ? room(&me->data, (size_t)size) : NULL;
    if (!data || !read_at((int)it.file, data, size, it.begin + window[0] * stride)) return LEFT_TO_OTHERS;
    window[1] = 0, window[3] = it.width;
    pixels = data;
  } else {
    uint8_t *data;
    if (it.kind == FILE_BY_NAME) {
      data = read_file(&me->data, (const char *)(intptr_t)it.begin, &it.size);
    } else {
      data = it.size > 0 && it.size <= MAX_BYTES ? room(&me->data, (size_t)it.size) : NULL;
      if (data && !read_at((int)it.file, data, it.size, it.begin)) data = NULL;
    }
    if (!data) return LEFT_TO_OTHERS;
    if (it.kind != FILE_BY_NAME && it.crc32 >= 0) job->row[row].crc32 = crc32_of(data, it.size);
    char message[MESSAGE_BYTES];
    int64_t columns = window[3] + SLACK < it.width ? window[3] + SLACK : it.width;
    size_t capacity = (size_t)(window[2] * columns * 3);
    uint8_t *space = room(&me->pixels, capacity);
    if (!space) return LEFT_TO_OTHERS;
    int code = fastssl_decode_window(data, (size_t)it.size, it.height, it.width, it.kind == JPEG, window, space,
                                     capacity, message);
    if (code != DECODED) return code;
    pixels = space;
  }
  return cut_groups(pool, me, job, row, pixels, window) ? DECODED : LEFT_TO_OTHERS;
}

/* Has memory for the squashed frames of so many groups. */
static int make_squares(struct worker *me, int64_t groups) {
  if (groups <= me->num_squares) return 1;
  struct buffer *more = realloc(me->squares, (size_t)groups * sizeof *more);
  if (!more) return 0;
  memset(more + me->num_squares, 0, (size_t)(groups - me->num_squares) * sizeof *more);
  me->squares = more, me->num_squares = groups;
  return 1;
}

static void *work(void *argument) {
  struct pool *pool = argument;
  struct worker me = {{NULL, 0}, {NULL, 0}, NULL, 0};
  pthread_mutex_lock(&pool->lock);
  for (;;) {
    while (!pool->first && !pool->stopping) pthread_cond_wait(&pool->work, &pool->lock);
    if (pool->stopping) break;
    struct job *job = pool->first;
    int64_t row = job->next++;
    if (job->next == job->rows) pool->first = job->after;
    job->busy++;
    pthread_mutex_unlock(&pool->lock);
    job->status[row] = (uint8_t)(make_squares(&me, job->groups) ? fill(pool, &me, job, row) : LEFT_TO_OTHERS);
    trim(&me.data, KEPT_BYTES);
    trim(&me.pixels, KEPT_BYTES);
    pthread_mutex_lock(&pool->lock);
    job->busy--;
    if (++job->done == job->rows || pool->stopping) pthread_cond_broadcast(&pool->finished);
  }
  pthread_mutex_unlock(&pool->lock);
  for (int64_t k = 0; k < me.num_squares; k++) free(me.squares[k].bytes);
  free(me.squares);
  free(me.data.bytes);
  free(me.pixels.bytes);
  return NULL;
}

/* A pool of `threads` threads, fewer where the system gives no more; NULL where it gives none. The number in the name
   rises with every change of what the functions and structs here take: batch_pool.py asks for the one it knows. */
struct pool *fastssl_pool_start_4(int threads, cut_function *cut) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, make_crc_table);
  struct pool *pool = calloc(1, sizeof *pool + (size_t)threads * sizeof(pthread_t));
  if (!pool) return NULL;
  pthread_mutex_init(&pool->lock, NULL);
  pthread_mutex_init(&pool->joining, NULL);
  pthread_cond_init(&pool->work, NULL);
  pthread_cond_init(&pool->finished, NULL);
  pool->process = getpid();
  pool->cut = cut;
  sigset_t all, before;
  sigfillset(&all);
  sigdelset(&all, SIGSEGV); /* a crash is reported where it happens */
  sigdelset(&all, SIGBUS);
  sigdelset(&all, SIGFPE);
  sigdelset(&all, SIGILL);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (pool->count < threads && !pthread_create(pool->threads + pool->count, NULL, work, pool)) {
#ifdef __linux__
    pthread_setname_np(pool->threads[pool->count], "fastssl-decode");
#endif
    pool->count++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (pool->count) return pool;
  free(pool);
  return NULL;
}

/* Fills the crops of a batch, and its part maps, part_bytes per row; status: one byte per row, DECODED where these are
   filled. Returns 0 where the pool was stopped before the end. */
int fastssl_pool_run(struct pool *pool, int64_t rows, struct row *row, int64_t groups, const struct group *group,
                     int64_t part_bytes, uint8_t *parts, uint8_t *status) {
  struct job job = {.row = row, .group = group, .rows = rows, .groups = groups, .part_bytes = part_bytes,
                    .parts = parts, .status = status};
  memset(status, NOT_DONE, (size_t)rows);
  if (rows < 1) return 1;
  if (getpid() != pool->process) return 0;
  pthread_mutex_lock(&pool->lock);
  if (!pool->stopping) {
    if (pool->first)
      pool->last->after = &job;
    else
      pool->first = &job;
    pool->last = &job;
    pthread_cond_broadcast(&pool->work);
    while (job.done < rows && !(pool->stopping && !job.busy)) pthread_cond_wait(&pool->finished, &pool->lock);
  }
  pthread_mutex_unlock(&pool->lock);
  return job.done == rows;
}

/* Ends the threads, each after its row, and with them the calls that wait. May be called more than once. */
void fastssl_pool_stop(struct pool *pool) {
  if (getpid() != pool->process) return;
  pthread_mutex_lock(&pool->lock);
  pool->stopping = 1;
  pthread_cond_broadcast(&pool->work);
  pthread_cond_broadcast(&pool->finished);
  pthread_mutex_unlock(&pool->lock);
  pthread_mutex_lock(&pool->joining);
  while (pool->count) pthread_join(pool->threads[--pool->count], NULL);
  pthread_mutex_unlock(&pool->joining);
}

/* Stops the pool and frees it; no other call may be under way. */
void fastssl_pool_free(struct pool *pool) {
  if (getpid() != pool->process) return; /* its locks may be held by threads that the child lacks */
  fastssl_pool_stop(pool);
  pthread_mutex_destroy(&pool->lock);
  pthread_mutex_destroy(&pool->joining);
  pthread_cond_destroy(&pool->work);
  pthread_cond_destroy(&pool->finished);
  free(pool);
}
